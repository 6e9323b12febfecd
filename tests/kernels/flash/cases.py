"""Cases of FlashAttention 4: attention as the bench's forms of it compute, under every kind of mask and block size."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from data_pipeline.batch import SequenceLayout
from data_pipeline.packing.form import SequenceForm
from model.attention.context import WHOLE, ContextShard
from model.attention.visibility import VisibleKeys, build_regular_layout, find_visible_keys
from tests.bench.gpu.attention import FlexForm, build_flex_form, flash_form
from tests.helpers.packed import pack_chats
from tests.kernels.case import Draw, Tensors, differentiate

LENGTH = 4096
QUERY_HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
BLOCK_SIZE = 32
# Lengths of texts [n] and of chats [prompt, response, ...]; two sequences are laid out apart.
TEXTS = [[[1600], [450], [1400]], [[200], [290], [2000]]]
CHATS = [[[400, 800], [120, 610]], [[200, 400, 120, 800]]]
# Positions and keys of a block of the BlockMask. All are tried under the first mask; those of a device kind under the
# last as well, the most general, and the first of them under every mask.
BLOCKS = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128), (256, 256))
BLOCKS_OF_KIND = {"h100": ((128, 128), (256, 128)), "b200": ((256, 128), (256, 256))}


@dataclass(frozen=True)
class FlashCase:
    """Attention of one layer under one mask, with blocks of one size in its BlockMask.

    layout: of whole sequences. doubled: [noisy | clean]. shard: the positions of one context-parallel rank.
    """

    mask: str
    blocks: tuple[int, int]
    layout: Callable[[], SequenceLayout]
    doubled: bool
    shard: ContextShard = WHOLE

    @property
    def name(self) -> str:
        """Return a name that says all."""
        return f"{self.mask}, blocks of {self.blocks[0]} x {self.blocks[1]}"

    def find_keys(self) -> VisibleKeys:
        """Return what every position of this rank sees."""
        keys = find_visible_keys(self.layout(), self.doubled)
        return keys.take(self.shard.find_whole(keys.num_clean, self.doubled))

    def draw(self, draw: Draw) -> Tensors:
        """Return heads and the output's gradient [R or K, B, n, D], positions first as in layers."""
        keys = self.find_keys()
        batch, num_queries = keys.clean_start.shape
        num_keys = keys.num_noisy + keys.num_clean
        return {
            "query": draw(num_queries, batch, QUERY_HEADS, HEAD_DIM).requires_grad_(),
            "key": draw(num_keys, batch, KEY_HEADS, HEAD_DIM).requires_grad_(),
            "value": draw(num_keys, batch, KEY_HEADS, HEAD_DIM).requires_grad_(),
            "gradient": draw(num_queries, batch, QUERY_HEADS, HEAD_DIM),
        }

    def run(self, inputs: Tensors) -> Tensors:
        """Return output and gradients, computed as in the bench on the inputs' device."""
        attend = build_flex_form(self.find_keys().to(inputs["query"].device), self.form)
        return differentiate(lambda *heads: attend(*map(_to_heads, heads)), inputs, _to_heads(inputs["gradient"]))

    @property
    def form(self) -> FlexForm:
        """Return the bench's form."""
        return flash_form(self.blocks)


def _to_heads(tensor: Tensor) -> Tensor:
    return tensor.permute(1, 2, 0, 3)


def _regular() -> SequenceLayout:
    return build_regular_layout(LENGTH, BLOCK_SIZE)


def _packed(sequences: list[list[list[int]]], doubled: bool) -> Callable[[], SequenceLayout]:
    """Pack as a stage with noise does (doubled), or one without."""
    form = SequenceForm(LENGTH, BLOCK_SIZE, BLOCK_SIZE if doubled else 1)
    return lambda: pack_chats(sequences, form).layout


def list_masks() -> list[FlashCase]:
    """Return a case of every kind of mask."""
    first, last = ContextShard(0, 2, None, BLOCK_SIZE), ContextShard(1, 2, None, BLOCK_SIZE)
    return [
        FlashCase("joint, regular", (128, 128), _regular, True),
        FlashCase("AR, regular", (128, 128), _regular, False),
        FlashCase("AR, packed texts", (128, 128), _packed(TEXTS[:1], False), False),
        FlashCase("joint, packed texts", (128, 128), _packed(TEXTS[:1], True), True),
        FlashCase("joint, packed chats with gaps", (128, 128), _packed(CHATS[:1], True), True),
        FlashCase("AR, two layouts of texts", (128, 128), _packed(TEXTS, False), False),
        FlashCase("joint, two layouts of texts", (128, 128), _packed(TEXTS, True), True),
        FlashCase("joint, two layouts of chats with gaps", (128, 128), _packed(CHATS, True), True),
        FlashCase("AR, rank 0 of 2", (128, 128), _regular, False, first),
        FlashCase("joint, rank 0 of 2", (128, 128), _regular, True, first),
        FlashCase("joint, rank 1 of 2", (128, 128), _regular, True, last),
        FlashCase("joint, two layouts of chats with gaps, rank 0 of 2", (128, 128), _packed(CHATS, True), True, first),
    ]


def list_cases(kind: str) -> list[FlashCase]:
    """Return the cases of a device kind: all block sizes under one mask, all masks with blocks that it takes."""
    joint, *others = list_masks()
    first, *more = BLOCKS_OF_KIND[kind]
    return [
        *(replace(joint, blocks=blocks) for blocks in BLOCKS),
        *(replace(case, blocks=first) for case in others),
        *(replace(others[-1], blocks=blocks) for blocks in more),
    ]


def find_case(kind: str, name: str) -> FlashCase:
    """Return the case of this name; raise KeyError where there is none."""
    return {case.name: case for case in list_cases(kind)}[name]

"""Cases of attention in training: our plans for CUDA, forward and backward, under every kind of mask."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from conf.schema import AttentionBackend, ModelConfig
from data_pipeline.batch import SequenceLayout
from data_pipeline.packing.form import SequenceForm
from model.attention.context import WHOLE, ContextAttention, ContextShard
from model.attention.plan import PlanBuilder
from model.attention.visibility import build_regular_layout, compute_dense_mask
from tests.helpers.packed import pack_chats
from tests.kernels.case import Draw, Tensors, differentiate

BLOCK_SIZE = 32
HEAD_DIM = 128
# Lengths of texts [n] and chats [prompt, response, ...], as shares of a sequence; two sequences are laid out apart.
TEXTS = [[[0.4], [0.11], [0.35]], [[0.05], [0.07], [0.5]]]
CHATS = [[[0.1, 0.2], [0.03, 0.15]], [[0.05, 0.1, 0.03, 0.2]]]


@dataclass(frozen=True)
class AttentionCase:
    """Attention of one layer on one rank, as PlanBuilder gives it on CUDA.

    query_heads, key_heads: of this tensor-parallel rank. layout: of the whole sequences. doubled: [noisy | clean].
    """

    name: str
    query_heads: int
    key_heads: int
    layout: Callable[[], SequenceLayout]
    doubled: bool
    shard: ContextShard = WHOLE

    def draw(self, draw: Draw) -> Tensors:
        """Return heads and the output's gradient [R or K, B, n, D], positions first as in layers."""
        layout = self.layout()
        batch, length = layout.position_ids.shape
        clean = len(self.shard.find_positions(length, doubled=False))
        num_queries, num_keys = (2 * clean, clean + length) if self.doubled else (clean, length)
        return {
            "query": draw(num_queries, batch, self.query_heads, HEAD_DIM).requires_grad_(),
            "key": draw(num_keys, batch, self.key_heads, HEAD_DIM).requires_grad_(),
            "value": draw(num_keys, batch, self.key_heads, HEAD_DIM).requires_grad_(),
            "gradient": draw(num_queries, batch, self.query_heads, HEAD_DIM),
        }

    def run(self, inputs: Tensors) -> Tensors:
        """Return output and gradients, computed by the plan for the inputs' device."""
        model = ModelConfig(num_attention_heads=self.query_heads, num_key_value_heads=self.key_heads, head_dim=HEAD_DIM)
        query = inputs["query"]
        plans = PlanBuilder(model, AttentionBackend.auto, query.dtype, query.device, self.shard)
        attend = plans.build(self.layout(), self.doubled).attend
        # Gathering other ranks' keys needs those ranks; what attends over the gathered ones does not.
        attend = attend.attend if isinstance(attend, ContextAttention) else attend
        return differentiate(lambda *heads: attend(*map(_to_heads, heads)), inputs, _to_heads(inputs["gradient"]))

    def compute_reference(self, inputs: Tensors) -> Tensors:
        """Return the same, from one dense softmax over masked scores."""
        layout = self.layout()
        mask = compute_dense_mask(layout, self.doubled)
        length = layout.sequence_length
        own = self.shard.find_positions(length, doubled=False)
        keys = torch.cat([own, torch.arange(length, 2 * length)]) if self.doubled else torch.arange(length)
        mask = mask[:, self.shard.find_positions(length, self.doubled)][:, :, keys][:, None]

        def attend(*heads: Tensor) -> Tensor:
            return scaled_dot_product_attention(*map(_to_heads, heads), attn_mask=mask, enable_gqa=True)

        return differentiate(attend, inputs, _to_heads(inputs["gradient"]))


def _to_heads(tensor: Tensor) -> Tensor:
    return tensor.permute(1, 2, 0, 3)


def _regular(length: int, block_size: int = BLOCK_SIZE) -> Callable[[], SequenceLayout]:
    return lambda: build_regular_layout(length, block_size)


def _packed(sequences: list[list[list[float]]], length: int, doubled: bool) -> Callable[[], SequenceLayout]:
    """Pack as a stage with noise does (doubled), or one without."""
    lengths = [[[max(1, int(share * length)) for share in chat] for chat in chats] for chats in sequences]
    form = SequenceForm(length, BLOCK_SIZE, BLOCK_SIZE if doubled else 1)
    return lambda: pack_chats(lengths, form).layout


def list_attention_cases(length: int, query_heads: int, key_heads: int, label: str) -> list[AttentionCase]:
    """Return a case for every kind of mask at this clean length: regular, packed; one layout, or one per sequence."""
    shapes = (query_heads, key_heads)
    cases = [
        AttentionCase(f"attention/ar/{label}", *shapes, _regular(length), doubled=False),
        AttentionCase(f"attention/joint/{label}", *shapes, _regular(length), doubled=True),
    ]
    for doubled, stage in ((False, "ar"), (True, "joint")):
        for kind, sequences in (("texts", TEXTS), ("chats", CHATS)):
            for count, laid_out in (("one", sequences[:1]), ("each", sequences)):
                layout = _packed(laid_out, length, doubled)
                cases.append(AttentionCase(f"attention/{stage}_{kind}_{count}/{label}", *shapes, layout, doubled))
    return cases


def list_shard_cases(length: int, query_heads: int, key_heads: int, label: str) -> list[AttentionCase]:
    """Return cases of context-parallel ranks: of 2, the first under packed chats as well, and of 4 the last but one."""
    shapes = (query_heads, key_heads)
    ranks = {"rank_0_of_2": (0, 2), "rank_1_of_2": (1, 2), "rank_2_of_4": (2, 4)}
    shards = {name: ContextShard(*place, None, BLOCK_SIZE) for name, place in ranks.items()}
    cases = []
    for doubled, stage in ((False, "ar"), (True, "joint")):
        for rank, shard in shards.items():
            layout = _regular(length)
            cases.append(AttentionCase(f"attention/{stage}_{rank}/{label}", *shapes, layout, doubled, shard))
        for count, sequences in (("one", CHATS[:1]), ("each", CHATS)):
            name = f"attention/{stage}_chats_{count}_rank_0_of_2/{label}"
            layout = _packed(sequences, length, doubled)
            cases.append(AttentionCase(name, *shapes, layout, doubled, shards["rank_0_of_2"]))
    return cases


def list_tail_cases(query_heads: int, key_heads: int, label: str) -> list[AttentionCase]:
    """Return cases of odd lengths, of a last tile of 128 positions that is almost empty or almost full, and of less."""
    lengths = {"odd": (149, 32), "one_over": (129, 43), "one_short": (255, 51), "toy": (48, 16)}
    return [
        AttentionCase(f"attention/{stage}_{kind}/{label}", query_heads, key_heads, _regular(*lengths[kind]), doubled)
        for kind in lengths
        for doubled, stage in ((False, "ar"), (True, "joint"))
    ]

"""One layer's attention alone, forward and backward, as TFLOP/s of the attended pairs.

Joint mask: FlexAttention in several forms, FlashAttention 4 (its FLASH backend) among them. Beside them dense causal
attention of one sequence long enough to have as many pairs.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from conf.schema import ModelConfig
from conf.system.errors import UserError
from model.attention.flex import build_flex_attention, build_mask_mod
from model.attention.tiles import CANDIDATES, MASK_BLOCK, BackwardTiles, check_tiles
from model.attention.visibility import VisibleKeys, build_regular_layout, find_visible_keys
from pretrain.costs import count_attended_pairs
from tests.bench.gpu.meter import measure
from tests.bench.gpu.steps import Workbench
from tests.bench.joint.cases import BLOCK_SIZE, SEED

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
FLEX = "flex (ours)"
FLASH, CUDNN = "dense causal FlashAttention", "dense causal cuDNN"
TILE = 128  # dense causal sequences are multiples of it

FLASH_BACKEND = "FLASH"  # FlexAttention's name for FlashAttention 4
# Blocks of the BlockMask to compare: H100 takes the first two, B200 the last two (tests/kernels/flash/README.md).
FLASH_BLOCKS = ((128, 128), (256, 128), (256, 256))


@dataclass(frozen=True)
class FlexForm:
    """One form of FlexAttention to compare with ours.

    mask_block: positions and keys of a block of the BlockMask, one number where they are equal. is_repeated: whether
    key heads are repeated for their query heads. tiles: of the backward; None: torch's own. options: more of the
    kernels. mode: of torch.compile.
    """

    mask_block: int | tuple[int, int] = MASK_BLOCK
    is_repeated: bool = False
    tiles: BackwardTiles | None = None
    options: dict[str, Any] = field(default_factory=dict)
    mode: str = "default"

    def __post_init__(self) -> None:
        if isinstance(self.mask_block, int):  # else FlashAttention 4's, whose tiles are its own
            check_tiles(self.tiles, self.mask_block)

    def kernel_options(self) -> dict[str, Any] | None:
        """Return FlexAttention's kernel_options."""
        return self.options | (self.tiles.kernel_options() if self.tiles else {}) or None


def flash_form(blocks: tuple[int, int]) -> FlexForm:
    """Return the form that runs FlashAttention 4; blocks: positions and keys of a block of the BlockMask."""
    return FlexForm(blocks, options={"BACKEND": FLASH_BACKEND})


AUTOTUNED = "flex, autotuned"
FLASH_FORMS = {f"flex, FlashAttention 4, blocks of {n} x {m}": flash_form((n, m)) for n, m in FLASH_BLOCKS}
FLEX_FORMS = {
    "flex, repeated heads": FlexForm(is_repeated=True),
    "flex, blocks of 256": FlexForm(256),
    "flex, torch's tiles": FlexForm(),
    **{f"flex, tiles {tiles}": FlexForm(tiles=tiles) for tiles in CANDIDATES[9, 128]},
    # Without ROWS_GUARANTEED_SAFE: a tile without keys for one of its positions would make that position NaN.
    "flex, prescaled": FlexForm(options={"PRESCALE_QK": True}),
    "flex, TMA": FlexForm(options={"USE_TMA": True}),
    **FLASH_FORMS,
    AUTOTUNED: FlexForm(mode="max-autotune-no-cudagraphs"),
}
JOINT_WAYS = (FLEX, *FLEX_FORMS)
DENSE_WAYS = (FLASH, CUDNN)
WAYS = (*JOINT_WAYS, *DENSE_WAYS)


def measure_attention(bench: Workbench, length: int) -> dict[str, Any]:
    """Return by way the results of measure with "tflops", or {"error"}; "fastest" names a way of the joint mask."""
    model, device = bench.settings.model, bench.meter.device
    dtype = next(bench.side.module.parameters()).dtype
    attended_pairs = count_attended_pairs(length, BLOCK_SIZE, doubled=True)
    dense_length = round_to_tile(math.sqrt(2 * attended_pairs))
    joint = _draw_heads(model, 2 * length, device, dtype)
    dense = _draw_heads(model, dense_length, device, dtype)
    keys = find_visible_keys(build_regular_layout(length, BLOCK_SIZE), doubled=True).to(device)
    ways = {name: _both_ways(_late(build), joint) for name, build in _joint_ways(keys, bench).items()}
    ways |= {name: _both_ways(attend, dense) for name, attend in _dense_ways(bench.meter.is_cuda).items()}
    results = measure(bench.meter, ways, bench.settings.rounds)
    dense_attended_pairs = count_attended_pairs(dense_length, BLOCK_SIZE, doubled=False)
    for name, result in results.items():
        if "error" not in result:
            seen = dense_attended_pairs if name in DENSE_WAYS else attended_pairs
            result["tflops"] = 12 * model.query_width * seen / result["seconds"] / 1e12
    working = [name for name in JOINT_WAYS if "tflops" in results.get(name, {})]
    fastest = max(working, key=lambda name: results[name]["tflops"], default=None)
    return results | {"fastest": fastest, "dense_length": dense_length}


def round_to_tile(num_positions: float) -> int:
    """Return the nearest multiple of a tile, at least one."""
    return max(TILE, TILE * round(num_positions / TILE))


def _draw_heads(model: ModelConfig, num_positions: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Draw query, key, value [1, heads, R, D], positions first in memory as in layers, and the output's gradient."""
    generator = torch.Generator(device=device).manual_seed(SEED)
    query_heads, groups = model.num_attention_heads, model.num_key_value_heads
    shapes = [(num_positions, 1, heads, model.head_dim) for heads in (query_heads, groups, groups, query_heads)]
    drawn = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
    heads = [tensor.permute(1, 2, 0, 3) for tensor in drawn]
    return [*(tensor.requires_grad_() for tensor in heads[:3]), heads[3]]


def _both_ways(attend: Attend, heads: list[Tensor]) -> Callable[[], object]:
    *inputs, grad = heads
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad)


def _late(build: Callable[[], Attend]) -> Attend:
    """Build the function when it is first called, so that a failure is its own."""
    built: list[Attend] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not built:
            built.append(build())
        return built[0](query, key, value)

    return attend


def _joint_ways(keys: VisibleKeys, bench: Workbench) -> dict[str, Callable[[], Attend]]:
    ways: dict[str, Callable[[], Attend]] = {FLEX: lambda: build_flex_attention(keys)}
    for name, form in FLEX_FORMS.items():
        if name != AUTOTUNED or bench.settings.autotune:
            ways[name] = partial(build_flex_form, keys, form)
    return ways


def build_flex_form(keys: VisibleKeys, form: FlexForm) -> Attend:
    """Build FlexAttention under the mask of these intervals in this form."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if form.options.get("BACKEND") == FLASH_BACKEND and not is_flash_installed():
        raise UserError("flash-attn-4 is not installed: pip install 'tri-mode[flash]'")
    batch, num_positions = keys.clean_start.shape
    device = keys.clean_start.device
    on_cuda = device.type == "cuda"
    create: Any = torch.compile(create_block_mask) if on_cuda else create_block_mask
    shape = (None if batch == 1 else batch, None, num_positions, keys.num_noisy + keys.num_clean)
    mask = create(build_mask_mod(keys), *shape, device=str(device), BLOCK_SIZE=form.mask_block)
    kernel: Any = torch.compile(flex_attention, dynamic=False, mode=form.mode) if on_cuda else flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if form.is_repeated:
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        return kernel(
            query, key, value, block_mask=mask, enable_gqa=not form.is_repeated, kernel_options=form.kernel_options()
        )

    return attend


def is_flash_installed() -> bool:
    """Return whether FlexAttention would find FlashAttention 4, by the same question."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def _dense_ways(on_cuda: bool) -> dict[str, Attend]:
    from torch.nn.attention import SDPBackend

    backends = {FLASH: SDPBackend.FLASH_ATTENTION} | ({CUDNN: SDPBackend.CUDNN_ATTENTION} if on_cuda else {})
    return {name: partial(_attend_causally, backend) for name, backend in backends.items()}


def _attend_causally(backend: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

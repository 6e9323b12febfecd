"""One layer's attention alone, forward and backward, as TFLOP/s of the attended pairs.

Joint mask: FlexAttention in several forms. Beside them dense causal attention of one sequence long enough to have as
many pairs.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from conf.schema import ModelConfig
from model.attention.flex import build_flex_attention, build_mask_mod
from model.attention.visibility import VisibleKeys, build_regular_layout, find_visible_keys
from pretrain.costs import count_attended_pairs
from tests.bench.gpu.meter import measure
from tests.bench.gpu.steps import Workbench
from tests.bench.joint.cases import BLOCK_SIZE, SEED

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
FLEX = "flex (ours)"
FLASH, CUDNN = "dense causal FlashAttention", "dense causal cuDNN"
TILE = 128  # dense causal sequences are multiples of it

# Tiles of 64 fit the diagonal closer; the backward's four must divide the mask's.
SMALL_TILES = {
    "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64,
    "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32,
}  # fmt: skip
SAFE = {"PRESCALE_QK": True, "ROWS_GUARANTEED_SAFE": True}  # every position sees itself
# Name: queries and keys of the BlockMask's blocks, whether heads are repeated, kernel options, mode of torch.compile.
FLEX_FORMS: dict[str, tuple[int, bool, dict[str, Any], str]] = {
    "flex, repeated heads": (128, True, {}, "default"),
    "flex, blocks of 256": (256, False, {}, "default"),
    "flex, tiles of 64": (64, False, SMALL_TILES, "default"),
    "flex, prescaled, rows safe": (128, False, SAFE, "default"),
    "flex, TMA": (128, False, {"USE_TMA": True}, "default"),
    "flex, autotuned": (128, False, {}, "max-autotune-no-cudagraphs"),
}
JOINT_WAYS = (FLEX, *FLEX_FORMS)
DENSE_WAYS = (FLASH, CUDNN)
WAYS = (*JOINT_WAYS, *DENSE_WAYS)
AUTOTUNED = "flex, autotuned"


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
            ways[name] = partial(_build_flex_form, keys, *form)
    return ways


def _build_flex_form(keys: VisibleKeys, mask_block: int, repeated: bool, options: dict[str, Any], mode: str) -> Attend:
    """Build FlexAttention under the same mask in another form."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, device = keys.num_noisy + keys.num_clean, keys.clean_start.device
    on_cuda = device.type == "cuda"
    create: Any = torch.compile(create_block_mask) if on_cuda else create_block_mask
    mask = create(build_mask_mod(keys), None, None, length, length, device=str(device), BLOCK_SIZE=mask_block)
    kernel: Any = torch.compile(flex_attention, dynamic=False, mode=mode) if on_cuda else flex_attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if repeated:
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        return kernel(query, key, value, block_mask=mask, enable_gqa=not repeated, kernel_options=dict(options) or None)

    return attend


def _dense_ways(on_cuda: bool) -> dict[str, Attend]:
    from torch.nn.attention import SDPBackend

    backends = {FLASH: SDPBackend.FLASH_ATTENTION} | ({CUDNN: SDPBackend.CUDNN_ATTENTION} if on_cuda else {})
    return {name: partial(_attend_causally, backend) for name, backend in backends.items()}


def _attend_causally(backend: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

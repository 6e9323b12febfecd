"""FlashAttention 4 compiles under our masks and refuses what README.md says; on a device it computes what is dense."""

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from launch.simulate.device_kind import KINDS
from launch.simulate.hooks import find_hook
from model.attention.visibility import VisibleKeys, build_regular_layout, find_visible_keys
from tests.bench.gpu.attention import FLASH_BLOCKS, build_flex_form, flash_form, is_flash_installed
from tests.kernels.case import draw_shapes
from tests.kernels.flash import table
from tests.kernels.flash.cases import BLOCKS_OF_KIND, HEAD_DIM, LENGTH, list_cases, list_masks
from tests.kernels.flash.cubin import Cubin, read_cubin
from tests.kernels.flash.processes import compile_cases, install
from tests.kernels.flash.table import (
    README,
    Direction,
    Outcome,
    format_tables,
    list_refusals,
    read_refusals,
    write_tables,
)
from tests.kernels.processes import find_reason_to_skip

needs_a_compiler = pytest.mark.skipif(find_reason_to_skip() is not None, reason=str(find_reason_to_skip()))
MAIN = Cubin("cutlass_flash_fwd_sm90FlashAttentionForwardSm90", "sm_90a", 168, 8)
# A thread of this kernel has an array of 256 bytes, at a place that ptxas cannot know.
PTX = """
.version 8.4
.target sm_90a
.address_size 64
.visible .entry f(.param .u64 place, .param .u32 index) {
  .local .align 4 .b8 array[256];
  .reg .b32 %r<4>; .reg .b64 %a<6>;
  ld.param.u64 %a1, [place]; ld.param.u32 %r1, [index];
  cvta.to.global.u64 %a2, %a1; mul.wide.u32 %a3, %r1, 4;
  mov.u64 %a4, array; add.s64 %a5, %a4, %a3;
  ld.global.u32 %r2, [%a2]; st.local.u32 [%a5], %r2; ld.local.u32 %r3, [array]; st.global.u32 [%a2], %r3;
  ret;
}
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_document_has_every_case(kind: str) -> None:
    cases = {(kind, case.mask, f"{case.blocks[0]} x {case.blocks[1]}") for case in list_cases(kind)}
    assert {case for case in read_refusals() if case[0] == kind} == cases


@pytest.mark.parametrize("kind", KINDS)
def test_the_bench_offers_blocks_that_the_device_takes_under_every_mask(kind: str) -> None:
    taken = {blocks for (found, _, blocks), refused in read_refusals().items() if found == kind and not any(refused)}
    refused = {blocks for (found, _, blocks), refused in read_refusals().items() if found == kind and any(refused)}
    offered = {f"{blocks[0]} x {blocks[1]}" for blocks in FLASH_BLOCKS}
    assert {f"{blocks[0]} x {blocks[1]}" for blocks in BLOCKS_OF_KIND[kind]} <= offered & taken - refused


def test_masks_are_what_their_names_say() -> None:
    for case in list_masks():
        keys = case.find_keys()
        batch, num_queries = keys.clean_start.shape
        assert (keys.num_noisy > 0) == case.mask.startswith("joint")
        assert (keys.gaps is not None) == ("gaps" in case.mask)
        assert batch == (2 if "two layouts" in case.mask else 1)
        assert batch == 1 or not torch.equal(keys.clean_start[0], keys.clean_start[1])
        assert (num_queries < keys.num_noisy + LENGTH) == ("rank" in case.mask)
        drawn = case.draw(draw_shapes(torch.bfloat16))
        assert drawn["query"].shape == (num_queries, batch, 32, HEAD_DIM)
        assert drawn["key"].shape == (keys.num_noisy + LENGTH, batch, 8, HEAD_DIM)


@needs_a_compiler
def test_registers_and_stack_are_those_that_ptxas_reports(tmp_path: Path) -> None:
    source, binary = tmp_path / "f.ptx", tmp_path / "f.sm_90a.cubin"
    source.write_text(PTX)
    assembler = find_hook("triton.backends.nvidia.compiler:get_ptxas")(90).path
    command = [assembler, "-v", "--gpu-name=sm_90a", str(source), "-o", str(binary)]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = read_cubin(binary)
    assert (found.name, found.target) == ("f", "sm_90a")
    assert found.stack == 256 and f"{found.stack} bytes stack frame" in report
    assert found.registers > 0 and f"Used {found.registers} registers" in report


def test_tables_are_read_as_written(tmp_path: Path) -> None:
    done, shared = Direction(1.0, None, [MAIN], 32), Direction(1.0, None, [], 1)
    refused = Direction(1.0, "ValueError: multiple of 256", [MAIN], 1)
    outcomes = {
        "h100": [
            Outcome("joint", (64, 64), 1.0, None, {"forward": done, "backward": refused}),
            Outcome("AR", (128, 64), 1.0, None, {"forward": shared, "backward": refused}),
        ],
        "b200": [Outcome("joint", (64, 64), 1.0, "TypeError: no", {}), Outcome("AR", (64, 64), 1.0, None, {})],
    }
    text = format_tables(outcomes)
    assert "| joint | 64 x 64 | 168 registers, 8 B, 32 keys a call | refused (1) |" in text
    assert "| AR | 128 x 64 | same kernels | refused (1) |" in text
    assert "1. ValueError: multiple of 256\n2. TypeError: no\n3. torch lowers to something else" in text
    path = tmp_path / "README.md"
    path.write_text(f"above\n{table.BEGIN}\nold\n{table.END}\nbelow")
    write_tables(text, path)
    assert path.read_text().startswith("above\n") and path.read_text().endswith("\nbelow")
    assert read_refusals(path) == list_refusals(outcomes)
    assert read_refusals(path)["h100", "joint", "64 x 64"] == (False, True)
    assert read_refusals(path)["b200", "AR", "64 x 64"] == (True, True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the extra as a user would, into a folder."""
    return install(tmp_path_factory.mktemp("flash"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@needs_a_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_and_block_size_compiles_or_is_refused_as_documented(kind: str, packages: Path) -> None:
    outcomes = compile_cases(kind, [case.name for case in list_cases(kind)], packages)
    expected = {case: refused for case, refused in read_refusals(README).items() if case[0] == kind}
    assert list_refusals({kind: outcomes}) == expected
    compiled = [cubin for outcome in outcomes for found in outcome.directions.values() for cubin in found.cubins]
    assert {cubin.target for cubin in compiled} == {f"sm_{KINDS[kind].architecture}a"}
    for kernel in ("flash_fwd_sm", "flash_bwd_sm"):
        assert any(kernel in cubin.name for cubin in compiled)


def compute_error(result: Tensor, expected: Tensor) -> float:
    return float((result.float() - expected.float()).norm() / expected.float().norm())


def attend_dense(keys: VisibleKeys, heads: list[Tensor]) -> Tensor:
    noisy = keys.mask_noisy(slice(None), range(keys.num_noisy))
    mask = torch.cat([noisy, keys.mask_clean(slice(None), range(keys.num_clean))], dim=2)[:, None]
    return scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_installed(), reason="the extra `flash` is not installed")
@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize("length", [1024, 1000])
def test_it_computes_what_dense_attention_does(length: int, doubled: bool) -> None:
    kind = {9: "h100", 10: "b200"}.get(torch.cuda.get_device_capability()[0])
    if kind is None:
        pytest.skip("neither Hopper nor Blackwell")
    keys = find_visible_keys(build_regular_layout(length, 8), doubled).to(torch.device("cuda"))
    positions = 2 * length if doubled else length
    drawn = [torch.randn(1, heads, positions, HEAD_DIM, device="cuda") for heads in (8, 2, 2, 8)]
    *inputs, gradient = (tensor.bfloat16() for tensor in drawn)
    exact = [tensor.float().requires_grad_() for tensor in inputs]
    expected = attend_dense(keys, exact)
    expected_gradients = torch.autograd.grad(expected, exact, gradient.float())
    for blocks in BLOCKS_OF_KIND[kind]:
        heads = [tensor.clone().requires_grad_() for tensor in inputs]
        output = build_flex_form(keys, flash_form(blocks))(*heads)
        errors = [compute_error(output, expected)]
        gradients = torch.autograd.grad(output, heads, gradient)
        errors += [compute_error(mine, its) for mine, its in zip(gradients, expected_gradients, strict=True)]
        assert max(errors) < 1e-2, (blocks, errors)

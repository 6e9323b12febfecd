"""What computes a layer is chosen in one place by what the machine has, and what it lacks is one message."""

import importlib.machinery
import re
import sys
from types import ModuleType

import pytest
import torch

from conf.schema import Fp8Recipe, ParallelConfig, PrecisionConfig, Recompute
from conf.system.errors import UserError
from model.megatron.kernel_choice import (
    APEX_EXTENSION,
    check_machine,
    choose_gradient_accumulation_fusion,
    choose_transformer_engine,
    list_choices,
)


def bring(monkeypatch: pytest.MonkeyPatch, *modules: str, capability: tuple[int, int] = (9, 0)) -> None:
    """Make this machine one with a CUDA device and these modules."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for name in modules:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


def used(recompute: Recompute = Recompute.none) -> dict[str, str]:
    return {choice.of: choice.used for choice in list_choices(recompute)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA")
def test_without_cuda_everything_is_ours_or_megatron_cores() -> None:
    assert choose_transformer_engine() == (False, "no CUDA device")
    assert choose_gradient_accumulation_fusion()[0] is False
    assert used() == {
        "layers": "megatron-core",
        "gradient_accumulation_fusion": "off",
        "norms": "model/megatron/operators.py",
        "SwiGLU": "model/megatron/operators.py",
        "rotation": "operator by operator",
        "residual": "one addition",
        "recomputed": "nothing",
    }


def test_on_cuda_operators_are_fused_without_any_package(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch)
    chosen = used()
    assert chosen["layers"] == "megatron-core"
    assert (chosen["norms"], chosen["rotation"]) == ("torch's fused kernel", "compiled")
    assert chosen["SwiGLU"] == "megatron-core's, compiled"


def test_norms_within_transformer_engines_matmuls_are_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch)
    assert used(Recompute.elementwise)["recomputed"] == "outputs of norms and SwiGLU"
    bring(monkeypatch, "transformer_engine")
    assert used(Recompute.elementwise)["recomputed"] == "SwiGLU's output"
    assert [used(other)["recomputed"] for other in (Recompute.selective, Recompute.full)] == ["attention", "layers"]


@pytest.mark.parametrize("module", ["transformer_engine", APEX_EXTENSION])
def test_either_package_adds_weight_gradients_in_their_product(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    bring(monkeypatch)
    assert choose_gradient_accumulation_fusion()[0] is False
    bring(monkeypatch, module)
    assert choose_gradient_accumulation_fusion()[0] is True


def test_every_choice_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, "transformer_engine")
    for choice in list_choices(Recompute.elementwise):
        assert re.fullmatch(r".+: .+ \(.{10,}\)", str(choice))
    assert used()["layers"] == used()["norms"] == "Transformer Engine"


ASKED = [
    (ParallelConfig(overlap_tensor_parallel=True), PrecisionConfig(), "parallel.overlap_tensor_parallel=false"),
    (ParallelConfig(offload_layers=2), PrecisionConfig(), "parallel.offload_layers=0"),
    (ParallelConfig(), PrecisionConfig(fp8=Fp8Recipe.tensorwise), "precision.fp8=null"),
]


@pytest.mark.parametrize(("parallel", "precision", "remedy"), ASKED)
def test_what_needs_transformer_engine_says_so_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, parallel: ParallelConfig, precision: PrecisionConfig, remedy: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"no CUDA device.*make setup GPU=1.*{re.escape(remedy)}"):
        check_machine(parallel, precision)
    bring(monkeypatch)
    with pytest.raises(UserError, match="transformer_engine is not installed"):
        check_machine(parallel, precision)
    bring(monkeypatch, "transformer_engine")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check_machine(parallel, precision)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "is_fine"),
    [
        (Fp8Recipe.tensorwise, (8, 0), "13.0", False),  # A100
        (Fp8Recipe.tensorwise, (8, 9), "12.4", True),
        (Fp8Recipe.tensorwise, (9, 0), "12.4", True),
        (Fp8Recipe.blockwise, (8, 9), "13.0", False),
        (Fp8Recipe.blockwise, (9, 0), "12.8", False),
        (Fp8Recipe.blockwise, (9, 0), "12.9", True),
    ],
)
def test_fp8_needs_a_device_and_a_cuda_that_have_it(
    monkeypatch: pytest.MonkeyPatch, recipe: Fp8Recipe, capability: tuple[int, int], cuda: str, is_fine: bool
) -> None:
    bring(monkeypatch, "transformer_engine", capability=capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if is_fine:
        check_machine(ParallelConfig(), PrecisionConfig(fp8=recipe))
        return
    with pytest.raises(UserError, match=rf"precision\.fp8={recipe.value} needs .*{capability[0]}\.{capability[1]} and"):
        check_machine(ParallelConfig(), PrecisionConfig(fp8=recipe))

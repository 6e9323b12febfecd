"""Every lever reaches its field of megatron-core's configurations."""

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from conf.schema import Dtype, Fp8Recipe, ModelConfig, ParallelConfig, PrecisionConfig, Recompute
from model.megatron.transformer_config import build_transformer_config
from model.megatron.tri_mode import without_fused_accumulation
from pretrain.step.optimizer import build_data_parallel_config

MODEL = ModelConfig("toy", 4, 64, 96, 4, 2, 32, 384)
INTERLEAVED: dict[str, Any] = {"pipeline_parallel": 2, "virtual_pipeline_parallel": 2}
SPLIT = {"tensor_parallel": 2, "sequence_parallel": True}


def build(fp8: Fp8Recipe | None = None, **parallel: Any) -> TransformerConfig:
    return build_transformer_config(MODEL, ParallelConfig(**parallel), PrecisionConfig(Dtype.bf16, fp8))


@pytest.mark.parametrize(
    ("given", "without", "expected"),
    [
        ({"overlap_pipeline": True, **INTERLEAVED}, INTERLEAVED, {"overlap_p2p_comm": True}),
        ({"overlap_tensor_parallel": True, **SPLIT}, SPLIT, {"tp_comm_overlap": True}),
        ({"offload_layers": 3}, {}, {"cpu_offloading": True, "cpu_offloading_num_layers": 3}),
        ({"fp8": Fp8Recipe.tensorwise}, {}, {"fp8": "hybrid"}),
        ({"fp8": Fp8Recipe.blockwise}, {}, {"fp8": "e4m3", "fp8_recipe": "blockwise"}),
        ({"recompute": Recompute.selective}, {}, {"recompute_granularity": "selective"}),
    ],
)
def test_a_lever_reaches_its_field_and_is_off_without(
    given: dict[str, Any], without: dict[str, Any], expected: dict[str, Any]
) -> None:
    on, off = build(**given), build(**without)
    for field, value in expected.items():
        assert getattr(on, field) == value
        assert getattr(off, field) != value


@pytest.mark.parametrize("fp8", [None, *Fp8Recipe])
def test_no_recipe_keeps_state_between_steps_and_weights_stay_as_they_are(fp8: Fp8Recipe | None) -> None:
    config = build(fp8)
    assert config.fp8_recipe != "delayed"
    assert not config.fp8_param
    assert config.params_dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("overlap_grad_reduce", "overlap_grad_reduce", True),
        ("overlap_param_gather", "overlap_param_gather", True),
        ("bucket_parameters", "bucket_size", 1000),
    ],
)
def test_a_data_parallel_lever_reaches_its_field(name: str, field: str, value: Any) -> None:
    assert getattr(build_data_parallel_config(ParallelConfig(**{name: value})), field) == value
    assert not getattr(build_data_parallel_config(ParallelConfig()), field)


def test_sends_between_stages_are_never_batched() -> None:
    assert not build(**INTERLEAVED).batch_p2p_comm


@pytest.mark.parametrize("on_cuda", [False, True])
def test_what_is_recomputed_is_a_module_and_nothing_of_megatron_cores_own_recomputation(
    monkeypatch: pytest.MonkeyPatch, on_cuda: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    config = build(recompute=Recompute.elementwise)
    assert (config.bias_activation_fusion, config.use_te_activation_func) == (False, True)
    assert config.recompute_granularity is None


@pytest.mark.parametrize("on_cuda", [False, True])
def test_swiglu_is_megatron_cores_compiled_one_on_cuda_alone(monkeypatch: pytest.MonkeyPatch, on_cuda: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_cuda)
    config = build()
    assert (config.bias_activation_fusion, config.use_te_activation_func) == (on_cuda, not on_cuda)


def test_with_transformer_engine_weight_gradients_are_added_in_their_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not build().gradient_accumulation_fusion
    engine = ModuleType("transformer_engine")
    engine.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine", engine)
    config = build()
    head = without_fused_accumulation(config)
    # megatron-core's own ColumnParallelLinear, which the head is, would refuse to be built without Apex.
    assert (config.gradient_accumulation_fusion, head.gradient_accumulation_fusion) == (True, False)
    assert {**vars(head), "gradient_accumulation_fusion": True} == vars(config)


def test_without_bias_and_dropout_the_residual_is_one_addition() -> None:
    """Check why bias_dropout_fusion stays off: torch leaves out dropout of probability 0."""
    x = torch.randn(4, 4, requires_grad=True)
    assert torch.nn.functional.dropout(x, p=0.0, training=True).data_ptr() == x.data_ptr()
    assert not build().bias_dropout_fusion

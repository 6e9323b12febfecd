"""Tensors that the backward pass recomputes equal those it would have saved, bit for bit, and are not saved."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from conf.schema import Dtype, Recompute
from model.megatron import spec, transformer_config
from model.megatron.operators import CompiledSwiGLU, SwiGLU, TorchRMSNorm
from model.megatron.recompute import recompute_elementwise, record_origin, save_origin
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.objective import score_positions
from tests.helpers.small_joint import BATCH, LENGTH, MODEL, NUM_POSITIONS, built_model


def draw(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(0))


def train(recompute: Recompute, dtype: Dtype, num_scored: int) -> list[Tensor]:
    """Return loss, cross entropies and gradients."""
    positions = torch.arange(num_scored)
    scored = score_positions(positions, draw((num_scored,)), torch.ones(num_scored))
    with built_model(recompute, dtype) as (model, plan):
        loss, losses = model(draw((BATCH, 2 * LENGTH)), plan, scored)
        loss.backward()
        return [loss.detach(), losses, *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("num_scored", [60, NUM_POSITIONS])
def test_losses_and_gradients_are_those_without_bit_for_bit(dtype: Dtype, num_scored: int) -> None:
    again, saved = (train(recompute, dtype, num_scored) for recompute in (Recompute.elementwise, Recompute.none))
    assert len(again) == len(saved) > 10
    assert all(torch.equal(mine, its) for mine, its in zip(again, saved, strict=True))


def count_saved(recompute: Recompute) -> int:
    """Return the bytes alive between the forward and the backward of the layers."""
    with built_model(recompute) as (model, plan):
        hidden = torch.randn(2 * LENGTH, BATCH, MODEL.hidden_size, requires_grad=True)
        model.decoder(hidden, attention_mask=None, attention_bias=plan)
        with LiveBytes([hidden, *model.parameters()]) as live:
            _output = model.decoder(hidden, attention_mask=None, attention_bias=plan)
            return live.now


def test_outputs_of_norms_and_swiglu_are_not_saved() -> None:
    by_position = 4 * (2 * MODEL.hidden_size + MODEL.ffn_hidden_size)
    assert (
        count_saved(Recompute.none) - count_saved(Recompute.elementwise)
        == MODEL.num_layers * NUM_POSITIONS * by_position
    )


def test_the_weight_comes_back_as_itself_with_its_gradient_buffer() -> None:
    """Saved tensors are replaced one by one because hooks around the matmul would give back another tensor."""
    with built_model(Recompute.elementwise) as (model, _):
        mlp = model.decoder.layers[0].mlp
        inner = torch.randn(NUM_POSITIONS, 1, 2 * MODEL.ffn_hidden_size, requires_grad=True)
        produced = mlp.activation_func(inner)
        output, _ = mlp.linear_fc2(produced)
        node = output.grad_fn
        while "Linear" not in node.name():
            node = node.next_functions[0][0]
        recomputed, weight = node.saved_tensors
        assert weight is mlp.linear_fc2.weight
        assert torch.equal(recomputed, produced)
        assert recomputed.data_ptr() != produced.data_ptr()


class Consumer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, saved: Tensor) -> Tensor:
        ctx.save_for_backward(saved)
        return 2 * x


@pytest.mark.parametrize("form", ["copy", "as positions"])
def test_a_consumer_may_save_chosen_positions_and_what_it_copies_stays(form: str) -> None:
    producer, x = SwiGLU(None), torch.randn(4, 2, 6, requires_grad=True)
    produced = producer(x)
    record_origin(producer, (x,), produced)
    saved = produced.detach().clone() if form == "copy" else produced.flatten(0, 1).detach()
    output = Consumer.apply(produced, saved)
    save_origin(producer, (produced,), (output, None))
    node: Any = output.grad_fn
    (found,) = node.saved_tensors
    assert torch.equal(found, saved) and found.shape == saved.shape
    assert (found.data_ptr() == saved.data_ptr()) is (form == "copy")


def test_without_gradients_nothing_is_left_on_a_tensor() -> None:
    with built_model(Recompute.elementwise) as (model, _), torch.no_grad():
        mlp = model.decoder.layers[0].mlp
        assert not hasattr(mlp.activation_func(torch.randn(4, 1, 2 * MODEL.ffn_hidden_size)), "origin")


def test_a_norm_within_the_product_that_reads_it_stays_as_it_is() -> None:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    submodules: Any = layer.submodules
    submodules.mlp.keywords["submodules"].activation_func = SwiGLU
    submodules.input_layernorm = submodules.pre_mlp_layernorm = IdentityOp
    fc1 = submodules.mlp.keywords["submodules"].linear_fc1
    recompute_elementwise(layer)
    assert submodules.input_layernorm is submodules.pre_mlp_layernorm is IdentityOp
    assert submodules.mlp.keywords["submodules"].linear_fc1 is fc1


def test_what_cuda_computes_is_recomputed_by_the_same_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA megatron-core's MLP computes SwiGLU itself; to be recomputed it is the same function in a module."""
    results = []
    with torch.compiler.set_stance("force_eager"):
        for recompute in (Recompute.none, Recompute.elementwise):
            for module in (spec, transformer_config):
                monkeypatch.setattr(module, "choose_fused_operators", lambda: (True, "as on CUDA"))
            with built_model(recompute) as (model, _):
                layer = model.decoder.layers[0]
                assert isinstance(layer.mlp.activation_func, CompiledSwiGLU) is (recompute is Recompute.elementwise)
                assert type(layer.input_layernorm) is TorchRMSNorm
            results.append(train(recompute, Dtype.bf16, num_scored=60))
    assert all(torch.equal(mine, its) for mine, its in zip(*results, strict=True))

"""Positions that the last layer leaves out change neither losses nor gradients."""

import pytest
import torch
from torch import Tensor

from conf.schema import Dtype, Recompute
from model.attention.plan import AttentionPlan
from model.megatron import tri_mode
from model.megatron.tri_mode import narrow_last_layer
from tests.helpers.objective import score_positions
from tests.helpers.small_joint import BATCH, LENGTH, NUM_POSITIONS, built_model


def run(positions: Tensor, recompute: Recompute, dtype: Dtype = Dtype.fp32) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """Run a joint forward that scores `positions`, and its backward.

    Returns loss, cross entropies, gradients, and the number of positions that the last layer's MLP computed.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 128, (BATCH, 2 * LENGTH), generator=generator)
    scored = score_positions(
        positions,
        torch.randint(0, 128, positions.shape, generator=generator),
        torch.rand(len(positions), generator=generator),
    )
    computed: list[int] = []
    with built_model(recompute, dtype) as (model, plan):
        model.decoder.layers[-1].mlp.linear_fc1.register_forward_hook(
            lambda module, inputs, output: computed.append(inputs[0].shape[:2].numel())
        )
        loss, losses = model(tokens, plan, scored)
        loss.backward()
        return loss.detach(), losses, [weight.grad for weight in model.parameters()], computed[0]


def test_in_half_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.arange(0, NUM_POSITIONS, 2)
    loss, losses, gradients, computed = run(positions, Recompute.none, Dtype.bf16)
    monkeypatch.setattr(tri_mode, "MAX_LAST_SHARE", -1.0)
    all_loss, all_losses, all_gradients, _ = run(positions, Recompute.none, Dtype.bf16)
    assert computed == len(positions)
    torch.testing.assert_close((loss, losses), (all_loss, all_losses), rtol=1e-2, atol=1e-2)
    for mine, its in zip(gradients, all_gradients, strict=True):
        assert (mine - its).norm() <= 2e-2 * its.norm()


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("num_scored", [0, 1, 90])
def test_losses_and_gradients_are_those_of_all_positions(
    num_scored: int, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = torch.randperm(NUM_POSITIONS, generator=torch.Generator().manual_seed(1))[:num_scored].sort().values
    loss, losses, gradients, computed = run(positions, recompute)
    assert computed == {0: 16, 1: 16, 90: 96}[num_scored]
    monkeypatch.setattr(tri_mode, "MAX_LAST_SHARE", -1.0)
    all_loss, all_losses, all_gradients, all_computed = run(positions, recompute)
    assert all_computed == NUM_POSITIONS
    torch.testing.assert_close((loss, losses), (all_loss, all_losses), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients, all_gradients, rtol=1e-4, atol=1e-6)


def test_where_nearly_all_positions_are_scored_none_is_left_out() -> None:
    plan = AttentionPlan(rotation=None, attend=None)  # type: ignore[arg-type]
    assert narrow_last_layer(plan, torch.arange(91), 100) is plan
    assert narrow_last_layer(plan, torch.arange(50), 100, multiple=128) is plan
    chosen = narrow_last_layer(plan, torch.arange(7, 57), 100).last_positions
    assert chosen is not None
    assert chosen.tolist() == [*range(7, 57), *[0] * 14]

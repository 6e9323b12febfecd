"""Learning rate over the token budget, WSD against megatron-core's own scheduler."""

from typing import Any

import pytest

from conf.schema import DecayShape, ScheduleConfig, ScheduleKind
from pretrain.step.learning_rate import compute_learning_rate


def schedule(**changes: object) -> ScheduleConfig:
    """Return a schedule of 1% warm-up and decay over the last fifth."""
    return ScheduleConfig(**{"peak_lr": 1e-3, "final_lr": 1e-4, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ScheduleKind)
@pytest.mark.parametrize("shape", DecayShape)
def test_it_warms_up_to_the_peak_and_ends_at_the_final_rate(kind: ScheduleKind, shape: DecayShape) -> None:
    course = schedule(kind=kind, decay_shape=shape)
    assert compute_learning_rate(course, 0.005) == pytest.approx(5e-4)
    assert compute_learning_rate(course, 0.01) == pytest.approx(1e-3)
    assert compute_learning_rate(course, 1.0) == pytest.approx(1e-4)
    rates = [compute_learning_rate(course, i / 100) for i in range(1, 101)]
    assert rates == sorted(rates, reverse=True)


def test_wsd_is_flat_until_the_decay() -> None:
    assert compute_learning_rate(schedule(), 0.79) == 1e-3
    assert compute_learning_rate(schedule(), 0.9) == pytest.approx(5.5e-4)


@pytest.mark.parametrize("shape", ["linear", "cosine", "minus_sqrt"])
def test_wsd_equals_megatron_core(shape: str) -> None:
    import torch
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer: Any = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    theirs = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=1e-4,
        lr_warmup_steps=10,
        lr_decay_steps=1000,
        lr_decay_style="WSD",
        wsd_decay_steps=200,
        lr_wsd_decay_style=shape,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1000,
        wd_incr_style="constant",
    )
    ours = schedule(decay_shape=DecayShape(shape))
    for step in range(1, 1001):
        theirs.step(1)
        assert compute_learning_rate(ours, step / 1000) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)

"""Bad steps are recognised and counted, and too many of them end the run."""

import math

import pytest

from conf.schema import GuardConfig, SpikePolicy
from conf.system.errors import UserError
from pretrain.health.guard import LASTING_STEPS, LossGuard, StepVerdict
from pretrain.objective.losses import StepNumbers
from pretrain.objective.scoring import StepCounts


def watch(losses: list[float], config: GuardConfig) -> tuple[LossGuard, list[StepVerdict]]:
    guard, verdicts = LossGuard(config), []
    for step, loss in enumerate(losses, 1):
        verdicts.append(guard.judge(loss, gradients_are_finite=True))
        guard.count(verdicts[-1], loss, step)
    return guard, verdicts


def test_a_loss_above_the_multiple_of_the_median_is_a_spike() -> None:
    losses = [4.0, 100.0, 4.1, 3.9, 8.3, 4.0, 7.9]  # the second: too early to know
    _, verdicts = watch(losses, GuardConfig(window=6, spike_factor=2.0))
    assert [loss for loss, verdict in zip(losses, verdicts, strict=True) if verdict is StepVerdict.spike] == [8.3]


def test_single_spikes_do_not_raise_what_counts_as_one() -> None:
    guard, verdicts = watch([4.0] * 4 + [9.0, 9.0, 9.0, 4.0] * 10, GuardConfig(window=4))
    assert verdicts[4:] == [*[StepVerdict.spike] * 3, StepVerdict.good] * 10
    assert list(guard.losses) == [4.0] * 4


@pytest.mark.parametrize("policy", list(SpikePolicy))
def test_a_lasting_shift_of_the_loss_is_a_level_and_no_spike_for_ever(policy: SpikePolicy) -> None:
    config = GuardConfig(spike_policy=policy)
    guard, verdicts = watch([4.0] * 64 + [9.0] * 1500, config)
    assert verdicts[64:] == [StepVerdict.spike] * LASTING_STEPS + [StepVerdict.good] * (1500 - LASTING_STEPS)
    assert guard.judge(18.5, True) is StepVerdict.spike, "a loss above the new level is one again"


def test_a_shift_is_seen_across_a_checkpoint_and_across_going_back() -> None:
    config = GuardConfig(spike_policy=SpikePolicy.roll_back)
    saved = watch([4.0] * 64, config)[0].state
    guard, _ = watch([4.0] * 64 + [9.0] * (LASTING_STEPS - 2), config)
    resumed = LossGuard(config)
    resumed.restore(guard.state)
    for _ in range(2):
        assert resumed.judge(9.0, True) is StepVerdict.spike
        resumed.count(StepVerdict.spike, 9.0, step=1)
        resumed.go_back(saved)
    assert resumed.judge(9.0, True) is StepVerdict.good
    assert resumed.spikes == LASTING_STEPS


def test_loss_or_gradients_that_are_not_finite_are_never_good() -> None:
    guard = LossGuard(GuardConfig())
    assert (
        guard.judge(math.nan, True) is guard.judge(math.inf, True) is guard.judge(4.0, False) is StepVerdict.nonfinite
    )
    for policy in SpikePolicy:
        assert not LossGuard(GuardConfig(spike_policy=policy)).applies(StepVerdict.nonfinite)


def test_only_report_applies_the_update_of_a_spike() -> None:
    applied = [LossGuard(GuardConfig(spike_policy=policy)).applies(StepVerdict.spike) for policy in SpikePolicy]
    assert applied == [policy is SpikePolicy.report for policy in SpikePolicy]


def test_so_many_bad_steps_in_a_row_end_the_run() -> None:
    guard = LossGuard(GuardConfig(max_nonfinite_steps=3))
    for verdict in (
        StepVerdict.nonfinite,
        StepVerdict.nonfinite,
        StepVerdict.good,
        StepVerdict.nonfinite,
        StepVerdict.nonfinite,
    ):
        guard.count(verdict, 4.0, step=1)
    with pytest.raises(UserError, match=r"last 3 steps up to step 7 .*max_nonfinite_steps"):
        guard.count(StepVerdict.nonfinite, math.nan, step=7)


@pytest.mark.parametrize("policy", list(SpikePolicy))
def test_spikes_are_limited_where_something_is_done_about_them(policy: SpikePolicy) -> None:
    guard = LossGuard(GuardConfig(spike_policy=policy, max_spikes=2))
    for _ in range(2):
        guard.count(StepVerdict.spike, 9.0, step=5)
    if policy is SpikePolicy.report:
        guard.count(StepVerdict.spike, 9.0, step=6)
        assert guard.spikes == 0
    else:
        with pytest.raises(UserError, match=r"spike number 3, guard\.max_spikes=2"):
            guard.count(StepVerdict.spike, 9.0, step=6)


def test_a_restored_guard_judges_like_the_one_that_was_saved() -> None:
    config = GuardConfig(window=4, spike_policy=SpikePolicy.skip)
    guard, _ = watch([4.0, 4.2, 3.8, 9.0], config)
    other = LossGuard(config)
    other.restore(guard.state)
    assert (other.state, other.limit) == (guard.state, guard.limit)
    fresh = LossGuard(config)
    fresh.restore({})
    assert fresh.state == LossGuard(config).state


def test_the_worst_that_any_rank_knows_of_a_step_is_the_verdict_of_all() -> None:
    guard, _ = watch([2.0] * 6, GuardConfig(window=6, spike_factor=2.0))
    good, spike = (StepNumbers([loss, 0, 0, 0, 0], StepCounts(), 1.0) for loss in (2.0, 9.0))
    infinite = StepNumbers([2.0, 0, 0, 0, 0], StepCounts(), math.inf)
    assert guard.judge_worst([good, good]) is StepVerdict.good
    assert guard.judge_worst([good, spike]) is StepVerdict.spike
    assert guard.judge_worst([spike, good, infinite]) is StepVerdict.nonfinite

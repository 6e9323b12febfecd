"""What counts as a bad step, and when there were too many."""

import math

import pytest

from conf.schema import GuardConfig, SpikePolicy
from conf.system.errors import UserError
from pretrain.health.guard import LossGuard, Verdict


def watch(losses: list[float], config: GuardConfig) -> tuple[LossGuard, list[Verdict]]:
    guard, verdicts = LossGuard(config), []
    for step, loss in enumerate(losses, 1):
        verdicts.append(guard.judge(loss, gradients_are_finite=True))
        guard.count(verdicts[-1], loss, step)
    return guard, verdicts


def test_a_loss_above_the_multiple_of_the_median_is_a_spike() -> None:
    losses = [4.0, 100.0, 4.1, 3.9, 8.3, 4.0, 7.9]  # the second: too early to know
    _, verdicts = watch(losses, GuardConfig(window=6, spike_factor=2.0))
    assert [loss for loss, verdict in zip(losses, verdicts, strict=True) if verdict is Verdict.spike] == [8.3]


def test_spikes_do_not_raise_what_counts_as_one() -> None:
    guard, verdicts = watch([4.0] * 4 + [9.0] * 20, GuardConfig(window=4))
    assert verdicts[4:] == [Verdict.spike] * 20
    assert list(guard.losses) == [4.0] * 4


def test_loss_or_gradients_that_are_not_finite_are_never_good() -> None:
    guard = LossGuard(GuardConfig())
    assert guard.judge(math.nan, True) is guard.judge(math.inf, True) is guard.judge(4.0, False) is Verdict.nonfinite
    for policy in SpikePolicy:
        assert not LossGuard(GuardConfig(spike_policy=policy)).applies(Verdict.nonfinite)


def test_only_report_applies_the_update_of_a_spike() -> None:
    applied = [LossGuard(GuardConfig(spike_policy=policy)).applies(Verdict.spike) for policy in SpikePolicy]
    assert applied == [policy is SpikePolicy.report for policy in SpikePolicy]


def test_so_many_bad_steps_in_a_row_end_the_run() -> None:
    guard = LossGuard(GuardConfig(max_nonfinite_steps=3))
    for verdict in (Verdict.nonfinite, Verdict.nonfinite, Verdict.good, Verdict.nonfinite, Verdict.nonfinite):
        guard.count(verdict, 4.0, step=1)
    with pytest.raises(UserError, match=r"last 3 steps up to step 7 .*max_nonfinite_steps"):
        guard.count(Verdict.nonfinite, math.nan, step=7)


@pytest.mark.parametrize("policy", list(SpikePolicy))
def test_spikes_are_limited_where_something_is_done_about_them(policy: SpikePolicy) -> None:
    guard = LossGuard(GuardConfig(spike_policy=policy, max_spikes=2))
    for _ in range(2):
        guard.count(Verdict.spike, 9.0, step=5)
    if policy is SpikePolicy.report:
        guard.count(Verdict.spike, 9.0, step=6)
        assert guard.spikes == 0
    else:
        with pytest.raises(UserError, match=r"spike number 3, guard\.max_spikes=2"):
            guard.count(Verdict.spike, 9.0, step=6)


def test_a_restored_guard_judges_like_the_one_that_was_saved() -> None:
    config = GuardConfig(window=4, spike_policy=SpikePolicy.skip)
    guard, _ = watch([4.0, 4.2, 3.8, 9.0], config)
    other = LossGuard(config)
    other.restore(guard.state)
    assert (other.state, other.limit) == (guard.state, guard.limit)
    fresh = LossGuard(config)
    fresh.restore({})
    assert fresh.state == LossGuard(config).state

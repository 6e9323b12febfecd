"""Ratios are ratios of sums; the interval is that of the bootstrap."""

import math

import numpy as np
import pytest

from lora.evaluation.records import AR, LINEAR, LINEAR_ADAPTER, Agreement, Decoded, DecodedPrompt, Prompt
from lora.evaluation.statistics import bootstrap_gain, compute_distinct_share, compute_gain_percent, summarize


def make_decoded(new_tokens: int, cycles: dict[str, int], agreement: Agreement = Agreement.equal) -> DecodedPrompt:
    """Speculation with these cycles of two forwards; AR with a forward per token. Half a second each."""
    tokens = list(range(new_tokens))
    decoded = {mode: Decoded(tokens, 1 + 2 * count, count, 0.5) for mode, count in cycles.items()}
    decoded[AR] = Decoded(tokens, new_tokens, 0, 0.5)
    return DecodedPrompt(Prompt([1], "group", "here:1"), decoded, {LINEAR: Agreement.equal, LINEAR_ADAPTER: agreement})


def test_numbers_are_ratios_of_sums() -> None:
    short = make_decoded(7, {LINEAR: 3, LINEAR_ADAPTER: 2})
    long = make_decoded(41, {LINEAR: 20, LINEAR_ADAPTER: 8})
    numbers = summarize([short, long], resamples=50, seed=0)
    linear, adapter = numbers.modes[LINEAR], numbers.modes[LINEAR_ADAPTER]
    assert (linear.new_tokens, linear.num_forwards, adapter.num_forwards) == (48, 48, 22)
    assert (linear.tokens_per_forward, adapter.tokens_per_forward) == (1.0, 48 / 22)
    assert (linear.acceptance_length, adapter.acceptance_length) == (46 / 23, 46 / 10)
    assert numbers.modes[AR].acceptance_length is None
    assert numbers.modes[AR].tokens_per_forward == 1
    assert adapter.tokens_per_second == 48
    assert numbers.gain_percent == pytest.approx(100 * (48 / 22 - 1))


def test_ties_are_equal_and_roundings_and_differences_are_not() -> None:
    cycles = {LINEAR: 3, LINEAR_ADAPTER: 2}
    for agreement, equals in (("equal", True), ("tie", True), ("rounded", False), ("different", False)):
        decoded = [make_decoded(7, cycles), make_decoded(7, cycles, Agreement(agreement))]
        modes = summarize(decoded, resamples=5, seed=0).modes
        assert modes[LINEAR_ADAPTER].equals_greedy_ar is equals
        assert modes[LINEAR].equals_greedy_ar
        assert modes[AR].num_equal == 2


def test_the_interval_is_that_of_the_delta_method() -> None:
    """For many prompts the bootstrap of a ratio of ratios is normal with the linearised variance."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(60, 129, size=800)
    before = np.stack((tokens, 1 + 2 * generator.integers(25, 45, size=800)), axis=1)
    after = np.stack((tokens, 1 + 2 * generator.integers(18, 35, size=800)), axis=1)
    # The gain is forwards before / forwards after: tokens cancel.
    ratio = before[:, 1].mean() / after[:, 1].mean()
    residuals = (before[:, 1] - ratio * after[:, 1]) / after[:, 1].mean()
    error = residuals.std() / math.sqrt(800)
    interval = bootstrap_gain(before, after, resamples=20000, seed=0)
    assert interval is not None
    expected = [100 * (ratio + sign * 1.96 * error - 1) for sign in (-1, 1)]
    assert interval == pytest.approx(expected, abs=0.1 * 100 * error)
    assert interval[0] < compute_gain_percent(before.sum(0), after.sum(0)) < interval[1]
    assert interval == bootstrap_gain(before, after, resamples=20000, seed=0)


def test_one_prompt_has_no_interval_and_equal_ones_a_point() -> None:
    before, after = np.array([[41, 41]]), np.array([[41, 21]])
    assert bootstrap_gain(before, after, 100, 0) is None
    assert bootstrap_gain(before.repeat(3, 0), after.repeat(3, 0), 100, 0) == pytest.approx((100 * 20 / 21,) * 2)


@pytest.mark.parametrize(
    ("tokens", "share"), [([1, 2, 3, 4, 5], 1.0), ([1] * 10, 1 / 7), ([1, 2] * 5, 2 / 7), ([1, 2], 1.0)]
)
def test_share_of_distinct_4grams(tokens: list[int], share: float) -> None:
    assert compute_distinct_share(tokens) == pytest.approx(share)

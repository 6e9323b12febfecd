"""Numbers of decoded batches, counted by hand; percentiles and intervals against their definitions."""

import math

import numpy as np
import pytest

from model.evaluate.decoder import Decoded
from model.evaluate.judging import Agreement, JudgedBatch
from model.evaluate.prompts import EvaluationPrompt
from model.evaluate.statistics import (
    bootstrap,
    compute_distinct_share,
    compute_percentiles,
    compute_wilson_interval,
    divide_sums,
    summarize,
)
from model.hf.options import AR, LINEAR


def make_batch(
    lengths: list[int], *, seconds: float, agreements: str = "", correct: list[bool | None] | None = None
) -> JudgedBatch:
    """Make one batch of prompts with these many new tokens; linear's third token (if any) is wrong unless equal."""
    ar = [list(range(length)) for length in lengths]
    kinds = [Agreement(kind) for kind in agreements.split()] or [Agreement.equal] * len(lengths)
    linear = [row if kind is Agreement.equal else [*row[:2], 99, *row[3:]] for row, kind in zip(ar, kinds, strict=True)]
    return JudgedBatch(
        [EvaluationPrompt([1], "group", f"here:{i}") for i in range(len(lengths))],
        {
            AR: Decoded(ar, {"prefill": 1, "step": max(lengths) - 1}, sum(lengths), 0, 0, [], 1.0),
            LINEAR: Decoded(linear, {"prefill": 1, "draft": 2, "verify": 3}, 60, 20, 5, [1, 3, 3], seconds),
        },
        {AR: [Agreement.equal] * len(lengths), LINEAR: kinds},
        {} if correct is None else {AR: [True] * len(lengths), LINEAR: correct},
        {},
    )


def test_numbers_are_ratios_of_sums() -> None:
    modes = summarize([make_batch([4, 8], seconds=3.0), make_batch([6], seconds=1.0)], resamples=10, seed=0).modes
    linear = modes[LINEAR]
    assert (linear.num_responses, linear.new_tokens, linear.num_forwards, linear.num_positions) == (3, 18, 12, 120)
    assert linear.forwards == {"prefill": 2, "draft": 4, "verify": 6}
    assert linear.tokens_per_forward == 18 / (2 * 6 + 6)  # the forwards of the first call served two prompts
    assert linear.tokens_per_position == 18 / 120
    assert linear.tokens_per_second == 18 / 4
    assert linear.commit_ratio == 10 / 40
    assert linear.acceptance_length == 14 / 6
    assert linear.acceptance_counts == {1: 2, 3: 4}
    ar = modes[AR]
    assert (ar.tokens_per_forward, ar.commit_ratio, ar.acceptance_length) == (18 / (8 * 2 + 6), None, None)
    assert ar.acceptance_counts == {}


def test_latencies_are_percentiles_over_responses() -> None:
    batches = [make_batch([4, 8], seconds=3.0), make_batch([6], seconds=1.0)]
    linear = summarize(batches, resamples=10, seed=0).modes[LINEAR]
    assert (linear.response_seconds.p50, linear.response_seconds.p95) == (3.0, 3.0)
    expected = np.percentile([3 / 4, 3 / 8, 1 / 6], [50, 95])
    assert [linear.token_seconds.p50, linear.token_seconds.p95] == pytest.approx(expected.tolist())
    assert compute_percentiles([1.0, 2.0]).p95 == pytest.approx(1.95)


def test_agreements_are_counted_apart() -> None:
    batches = [make_batch([4, 8, 5], seconds=1.0, agreements="equal tie different"), make_batch([10], seconds=1.0)]
    modes = summarize(batches, resamples=10, seed=0).modes
    counts = modes[LINEAR].agreement
    assert counts is not None
    assert (counts.equal, counts.tie, counts.rounded, counts.different) == (2, 1, 0, 1)
    assert counts.rate == 3 / 4  # a tie is as good
    assert not counts.equals_greedy_ar
    assert counts.leading_share == pytest.approx((1 + 2 / 8 + 2 / 5 + 1) / 4)
    of_itself = modes[AR].agreement
    assert of_itself is not None
    assert of_itself.equals_greedy_ar


@pytest.mark.parametrize(("kinds", "equals"), [("equal tie", True), ("equal rounded", False), ("tie different", False)])
def test_ties_are_equal_and_roundings_and_differences_are_not(kinds: str, equals: bool) -> None:
    counts = summarize([make_batch([4, 4], seconds=1, agreements=kinds)], resamples=2, seed=0).modes[LINEAR].agreement
    assert counts is not None
    assert counts.equals_greedy_ar is equals


def test_accuracy_is_of_the_prompts_with_answers() -> None:
    batches = [
        make_batch([4, 4, 4], seconds=1, correct=[True, None, False]),
        make_batch([4], seconds=1, correct=[True]),
    ]
    accuracy = summarize(batches, resamples=2, seed=0).modes[LINEAR].accuracy
    assert accuracy is not None
    assert (accuracy.num_scored, accuracy.num_correct, accuracy.share) == (3, 2, 2 / 3)
    assert summarize([make_batch([4], seconds=1)], resamples=2, seed=0).modes[LINEAR].accuracy is None


@pytest.mark.parametrize(("correct", "scored"), [(0, 5), (1, 5), (7, 10), (500, 1000), (10, 10)])
def test_wilsons_interval_ends_where_the_score_test_begins_to_reject(correct: int, scored: int) -> None:
    share = correct / scored
    low, high = compute_wilson_interval(correct, scored)
    for bound in (low, high):
        assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / scored), abs=1e-6)
    assert low <= share <= high


def test_the_interval_of_a_ratio_is_that_of_the_delta_method() -> None:
    generator = np.random.default_rng(1)
    calls = np.stack((generator.integers(60, 129, size=800), generator.integers(25, 45, size=800)), axis=1)
    ratio = calls[:, 0].mean() / calls[:, 1].mean()
    error = (calls[:, 0] - ratio * calls[:, 1]).std() / calls[:, 1].mean() / math.sqrt(800)
    interval = bootstrap(calls, divide_sums, resamples=5000, seed=0)
    assert interval == pytest.approx([ratio - 1.96 * error, ratio + 1.96 * error], abs=0.1 * error)
    assert bootstrap(calls[:1], divide_sums, 10, 0) is None


@pytest.mark.parametrize(
    ("tokens", "share"), [([1, 2, 3, 4, 5], 1.0), ([1] * 10, 1 / 7), ([1, 2] * 5, 2 / 7), ([1, 2], 1.0)]
)
def test_share_of_distinct_4grams(tokens: list[int], share: float) -> None:
    assert compute_distinct_share(tokens) == pytest.approx(share)

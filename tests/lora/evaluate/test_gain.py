"""The gain of an adapter: counts of a model that repeats itself, ratios of sums, and the bootstrap interval."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.system.errors import UserError
from lora.evaluate.gain import bootstrap_gain, compute_gain_percent, evaluate_drafter, summarize_gain
from model.evaluate.decoder import Decoded
from model.evaluate.judging import Agreement, JudgedBatch
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt
from model.evaluate.variants import LINEAR_ADAPTER
from model.export.load import attach_adapter
from model.hf.layers import find_draft_adapters
from model.hf.options import AR, LINEAR
from tests.helpers.tiny_exports import REPEATED_TOKEN, make_repetitive_model, save_random_adapter

PROMPT = EvaluationPrompt([5, 120, 130], "group", "here:1")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an adapter strong enough to spoil most drafts."""
    return save_random_adapter(tmp_path_factory.mktemp("evaluate") / "adapter", std=5.0)


@pytest.fixture
def model(adapter: Path) -> Any:
    model = make_repetitive_model()
    attach_adapter(model, adapter)
    return model


def test_groups_are_evaluated_apart_and_together(model: Any) -> None:
    prompts = [PROMPT, replace(PROMPT, group="other", token_ids=[7]), replace(PROMPT, token_ids=[9, 8])]
    options = EvaluationOptions(max_new_tokens=17, resamples=20)
    evaluation = evaluate_drafter(model, prompts, options, stop_ids=())
    groups = {name: group.numbers.num_prompts for name, group in evaluation.groups.items()}
    assert list(groups.items()) == [("group", 2), ("other", 1)]
    assert [batch.prompts[0] for batch in evaluation.batches] == prompts
    assert evaluation.overall.numbers.num_prompts == 3
    assert list(evaluation.overall.modes) == [AR, LINEAR, LINEAR_ADAPTER]
    assert evaluation.overall.modes[LINEAR].acceptance_length == 8
    assert evaluation.overall.modes[LINEAR].tokens_per_forward == 17 / 5
    assert evaluation.overall.gain_percent < 0
    assert evaluation.overall.distinct_4grams == 1 / 14
    assert evaluation.differences == []
    assert evaluation.settings["block_length"] == 8
    stopped = evaluate_drafter(model, prompts, options, stop_ids=(REPEATED_TOKEN,))
    assert stopped.overall.modes[AR].new_tokens == 3


def test_the_adapter_is_still_on_when_all_is_done(model: Any) -> None:
    evaluate_drafter(model, [PROMPT], EvaluationOptions(max_new_tokens=9, resamples=2))
    assert len(find_draft_adapters(model)[1]) == 2


def test_what_cannot_be_evaluated_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="no draft adapter to evaluate"):
        evaluate_drafter(make_repetitive_model(), [PROMPT])
    with pytest.raises(UserError, match="no prompts"):
        evaluate_drafter(model, [])
    with pytest.raises(UserError, match=r"here:1: the prompt has 3 tokens; .* 256 positions"):
        evaluate_drafter(model, [PROMPT], EvaluationOptions(max_new_tokens=254))


def make_decoded(new_tokens: int, cycles: dict[str, int]) -> JudgedBatch:
    """Return judged speculation with these cycles of two forwards, and AR step by step; half a second each."""
    tokens = [list(range(new_tokens))]
    lengths = {mode: [*[1] * (count - 1), new_tokens - count] for mode, count in cycles.items()}
    decoded = {AR: Decoded(tokens, {"prefill": 1, "step": new_tokens - 1}, 1, 0, 0, [], 0.5)}
    for mode, count in cycles.items():
        forwards = {"prefill": 1, "draft": count, "verify": count}
        decoded[mode] = Decoded(tokens, forwards, 1, 1, 1, lengths[mode], 0.5)
    agreements = {mode: [Agreement.equal] for mode in decoded}
    return JudgedBatch([EvaluationPrompt([1], "group", "here:1")], decoded, agreements, {}, {})


def test_numbers_are_ratios_of_sums() -> None:
    short = make_decoded(7, {LINEAR: 3, LINEAR_ADAPTER: 2})
    long = make_decoded(41, {LINEAR: 20, LINEAR_ADAPTER: 8})
    gain = summarize_gain([short, long], resamples=50, seed=0)
    linear, adapter = gain.modes[LINEAR], gain.modes[LINEAR_ADAPTER]
    assert (linear.new_tokens, linear.num_forwards, adapter.num_forwards) == (48, 48, 22)
    assert (linear.tokens_per_forward, adapter.tokens_per_forward) == (1.0, 48 / 22)
    assert (linear.acceptance_length, adapter.acceptance_length) == (46 / 23, 46 / 10)
    assert gain.modes[AR].acceptance_length is None
    assert adapter.tokens_per_second == 48
    assert gain.gain_percent == pytest.approx(100 * (48 / 22 - 1))
    assert gain.distinct_4grams == 1


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

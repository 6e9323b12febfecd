"""The gain of a draft adapter in tokens per forward, with its interval: of all prompts and of each group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.evaluate.decoder import Track
from model.evaluate.evaluation import evaluate_modes
from model.evaluate.judging import JudgedBatch
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt
from model.evaluate.statistics import (
    GroupNumbers,
    ModeNumbers,
    bootstrap,
    count_tokens_and_forwards,
    divide_sums,
    summarize,
)
from model.evaluate.variants import LINEAR_ADAPTER, choose_variants
from model.hf.options import AR, LINEAR

# Settings that decide the numbers; the others have no effect here.
SETTINGS = ("dtype", "device", "block_length", "max_new_tokens", "resamples")


@dataclass(frozen=True)
class GroupGain:
    """The gain on one group of prompts.

    numbers: of AR, linear and linear+adapter. gain_percent: of tokens per forward, by the adapter.
    interval: 95% bootstrap interval of the gain over prompts, in percent; None with a single prompt.
    """

    numbers: GroupNumbers
    gain_percent: float
    interval: tuple[float, float] | None

    @property
    def modes(self) -> dict[str, ModeNumbers]:
        """The numbers by mode."""
        return self.numbers.modes

    @property
    def distinct_4grams(self) -> float:
        """Mean share of different 4-grams in AR's outputs; a low one means that they loop, which flatters drafts."""
        return self.modes[AR].distinct_4grams


@dataclass(frozen=True)
class DrafterEvaluation:
    """The gain on all prompts and on each group.

    groups: in the order in which prompts name them. batches: of one prompt each. settings: for reports.
    differences: place and mode of outputs that differ from AR's though they must not: a defect, or a broken device.
    """

    overall: GroupGain
    groups: dict[str, GroupGain]
    batches: list[JudgedBatch]
    settings: dict[str, Any]
    differences: list[tuple[str, str]]


def evaluate_drafter(
    model: Any,
    prompts: Sequence[EvaluationPrompt],
    options: EvaluationOptions | None = None,
    *,
    stop_ids: tuple[int, ...] | None = None,
    track: Track = iter,
) -> DrafterEvaluation:
    """Decode every prompt by AR and by linear self-speculation without and with the attached draft adapter.

    model: an export's, loaded any way, with a draft adapter attached (see attach_adapter) and switched on.
    stop_ids: tokens that end a response; None takes the model's own. track: wraps the jobs in a progress bar.

    Raises: UserError if the model has no adapter, or prompts are missing or too long.
    """
    options = options or EvaluationOptions()
    variants = choose_variants((AR, LINEAR), has_adapter=True)
    evaluation = evaluate_modes(model, prompts, variants, options, stop_ids=stop_ids, track=track)
    resampling = (options.resamples, options.resampling_seed)
    settings = {name: evaluation.settings[name] for name in SETTINGS} | {"seed": options.resampling_seed}
    return DrafterEvaluation(
        overall=summarize_gain(evaluation.batches, *resampling),
        groups={
            name: summarize_gain([batch for batch in evaluation.batches if batch.group == name], *resampling)
            for name in evaluation.groups
        },
        batches=evaluation.batches,
        settings=settings,
        differences=evaluation.differences,
    )


def summarize_gain(batches: Sequence[JudgedBatch], resamples: int, seed: int) -> GroupGain:
    """Compute the gain on one or more prompts, each decoded by itself."""
    before, after = (count_tokens_and_forwards(batches, name) for name in (LINEAR, LINEAR_ADAPTER))
    return GroupGain(
        summarize(batches, resamples=resamples, seed=seed),
        float(compute_gain_percent(before.sum(0), after.sum(0))),
        bootstrap_gain(before, after, resamples, seed),
    )


def compute_gain_percent(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the relative gain of tokens per forward in percent; both are [..., (new tokens, forwards)]."""
    return 100 * (divide_sums(after) / divide_sums(before) - 1)


def bootstrap_gain(before: np.ndarray, after: np.ndarray, resamples: int, seed: int) -> tuple[float, float] | None:
    """Return the percentile interval of compute_gain_percent over prompts, drawn with replacement with both counts.

    before, after: [N, (new tokens, forwards)]. None if N = 1, which allows no interval.
    """
    both = np.concatenate((before, after), axis=1)
    return bootstrap(both, lambda sums: compute_gain_percent(sums[:, :2], sums[:, 2:]), resamples, seed)

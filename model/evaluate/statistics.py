"""Turns judged batches into numbers: ratios of sums, percentiles, confidence intervals, repetition."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from model.evaluate.choice_scoring import ChoiceScores
from model.evaluate.choices import Choices
from model.evaluate.decoder import Decoded
from model.evaluate.judging import Agreement, JudgedBatch, find_first_difference
from model.hf.options import AR

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054  # two-sided, at CONFIDENCE


@dataclass(frozen=True)
class Percentiles:
    """Median and 95th percentile over responses."""

    p50: float
    p95: float


@dataclass(frozen=True)
class AgreementCounts:
    """Counts responses by their Agreement with greedy AR.

    leading_share: mean share of AR's tokens before the first difference.
    """

    equal: int
    tie: int
    rounded: int
    different: int
    leading_share: float

    @property
    def equals_greedy_ar(self) -> bool:
        """Whether every response is AR's, or first differs where AR's two best logits tie."""
        return not (self.rounded or self.different)

    @property
    def rate(self) -> float:
        """Share of responses that are AR's; ties count as equal."""
        agreeing = self.equal + self.tie
        return agreeing / (agreeing + self.rounded + self.different)


@dataclass(frozen=True)
class Accuracy:
    """Share of scored responses that give an accepted answer. interval: Wilson's 95% interval."""

    num_scored: int
    num_correct: int
    share: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class ChoiceNumbers:
    """What one way to score choices measured on all questions of a group.

    Attributes:
        accuracy: share of the questions whose chosen text is right.
        guessing: the share that guessing would reach.
        num_forwards: model calls, one counted for every question it served.
        num_positions: token positions that the layers computed, padding included.
    """

    accuracy: Accuracy
    guessing: float
    num_forwards: int
    num_positions: int


@dataclass(frozen=True)
class ModeNumbers:
    """What one variant measured on all prompts of a group.

    Attributes:
        num_responses: responses, one per prompt.
        new_tokens: tokens of all responses.
        num_forwards: model calls, prefills included.
        forwards: model calls by kind.
        num_positions: token positions that the layers computed.
        seconds: decoding time, prefills included.
        tokens_per_forward: a response's tokens by the forwards of its call, as a ratio of sums.
        tokens_per_forward_interval: its 95% bootstrap interval over calls; None for a single call.
        tokens_per_position: new tokens by computed token positions.
        tokens_per_second: new tokens of all prompts of a call together, by its time.
        commit_ratio: share of the proposed tokens that were committed; None without proposals.
        acceptance_length: mean tokens per cycle of draft and verification, the verifier's own included; None without
            cycles.
        acceptance_counts: number of cycles by the tokens they emitted.
        response_seconds: time until a response is complete, which is the time of its call.
        token_seconds: the same, divided by the response's tokens.
        agreement: comparison with greedy AR; None if decoding is sampled.
        accuracy: exact match; None without answers.
        distinct_4grams: mean share of distinct 4-grams in a response. A low share is a loop, which flatters drafts.
    """

    num_responses: int
    new_tokens: int
    num_forwards: int
    forwards: dict[str, int]
    num_positions: int
    seconds: float
    tokens_per_forward: float
    tokens_per_forward_interval: tuple[float, float] | None
    tokens_per_position: float
    tokens_per_second: float
    commit_ratio: float | None
    acceptance_length: float | None
    acceptance_counts: dict[int, int]
    response_seconds: Percentiles
    token_seconds: Percentiles
    agreement: AgreementCounts | None
    accuracy: Accuracy | None
    distinct_4grams: float


@dataclass(frozen=True)
class GroupNumbers:
    """The numbers of one group of prompts. modes: by the variant's name."""

    num_prompts: int
    modes: dict[str, ModeNumbers]


def summarize(batches: Sequence[JudgedBatch], *, resamples: int, seed: int) -> GroupNumbers:
    """Compute the numbers of one or more batches."""
    modes = {name: _summarize_mode(batches, name, resamples, seed) for name in batches[0].decoded}
    return GroupNumbers(sum(len(batch.prompts) for batch in batches), modes)


def count_tokens_and_forwards(batches: Sequence[JudgedBatch], name: str) -> np.ndarray:
    """Return [calls, (new tokens, forwards)]; a forward counts once for every prompt it served."""
    calls = [batch.decoded[name] for batch in batches]
    return np.array([(sum(map(len, call.tokens)), call.num_forwards * len(call.tokens)) for call in calls])


def _summarize_mode(batches: Sequence[JudgedBatch], name: str, resamples: int, seed: int) -> ModeNumbers:
    calls = [batch.decoded[name] for batch in batches]
    responses = [tokens for call in calls for tokens in call.tokens]
    forwards: Counter[str] = Counter()
    for call in calls:
        forwards.update(call.forwards)
    counts = count_tokens_and_forwards(batches, name)
    new_tokens, num_positions = sum(map(len, responses)), sum(call.num_positions for call in calls)
    seconds, num_proposed = sum(call.seconds for call in calls), sum(call.num_proposed for call in calls)
    cycles = Counter(chain.from_iterable(call.acceptance_lengths for call in calls))
    return ModeNumbers(
        num_responses=len(responses),
        new_tokens=new_tokens,
        num_forwards=forwards.total(),
        forwards=dict(forwards),
        num_positions=num_positions,
        seconds=seconds,
        tokens_per_forward=float(divide_sums(counts.sum(0))),
        tokens_per_forward_interval=bootstrap(counts, divide_sums, resamples, seed),
        tokens_per_position=new_tokens / num_positions,
        tokens_per_second=new_tokens / seconds,
        commit_ratio=sum(call.num_committed for call in calls) / num_proposed if num_proposed else None,
        acceptance_length=sum(n * count for n, count in cycles.items()) / cycles.total() if cycles else None,
        acceptance_counts=dict(sorted(cycles.items())),
        response_seconds=compute_percentiles([call.seconds for call in calls for _ in call.tokens]),
        token_seconds=compute_percentiles([call.seconds / len(tokens) for call in calls for tokens in call.tokens]),
        agreement=_count_agreements(batches, name),
        accuracy=_count_correct(batches, name),
        distinct_4grams=sum(map(compute_distinct_share, responses)) / len(responses),
    )


def _count_agreements(batches: Sequence[JudgedBatch], name: str) -> AgreementCounts | None:
    agreements = [agreement for batch in batches for agreement in batch.agreements.get(name, ())]
    if not agreements:
        return None
    counts = Counter(agreements)
    shares = [share for batch in batches for share in _leading_shares(batch.decoded[AR], batch.decoded[name])]
    return AgreementCounts(*(counts[kind] for kind in Agreement), leading_share=sum(shares) / len(shares))


def _leading_shares(ar: Decoded, other: Decoded) -> list[float]:
    responses = zip(ar.tokens, other.tokens, strict=True)
    return [find_first_difference(expected, tokens) / len(expected) for expected, tokens in responses]


def _count_correct(batches: Sequence[JudgedBatch], name: str) -> Accuracy | None:
    scored = [correct for batch in batches for correct in batch.correct.get(name, ()) if correct is not None]
    if not scored:
        return None
    return _compute_accuracy(scored)


def _compute_accuracy(correct: Sequence[bool]) -> Accuracy:
    total, number = sum(correct), len(correct)
    return Accuracy(number, total, total / number, compute_wilson_interval(total, number))


def summarize_choices(scored: Sequence[tuple[Choices, ChoiceScores]]) -> ChoiceNumbers:
    """Compute the numbers of one way to score choices. scored: at least one question and its scores."""
    return ChoiceNumbers(
        accuracy=_compute_accuracy([choices.correct[scores.chosen] for choices, scores in scored]),
        guessing=sum(sum(choices.correct) / len(choices.correct) for choices, _ in scored) / len(scored),
        num_forwards=sum(scores.num_forwards for _, scores in scored),
        num_positions=sum(scores.num_positions for _, scores in scored),
    )


def compute_percentiles(values: Sequence[float]) -> Percentiles:
    """Compute percentiles, interpolated linearly between the two nearest values."""
    p50, p95 = np.percentile(values, (50, 95)).tolist()
    return Percentiles(p50, p95)


def divide_sums(sums: np.ndarray) -> np.ndarray:
    """Divide the first by the second entry of the last dimension: [..., 2] -> [...]."""
    return sums[..., 0] / sums[..., 1]


def bootstrap(
    calls: np.ndarray, compute: Callable[[np.ndarray], np.ndarray], resamples: int, seed: int
) -> tuple[float, float] | None:
    """Return the 95% percentile interval of a number computed from sums over calls drawn with replacement.

    Args:
        calls: [N, K], the counts of each call.
        compute: sums [resamples, K] -> the number [resamples].
        resamples: how often N calls are drawn.
        seed: seed of the draws.

    Returns:
        The lower and the upper bound, or None for N = 1, which says nothing about the spread.
    """
    if len(calls) == 1:
        return None
    generator = np.random.default_rng(seed)
    sums = np.stack([calls[generator.integers(len(calls), size=len(calls))].sum(0) for _ in range(resamples)])
    low, high = np.quantile(compute(sums), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def compute_wilson_interval(num_correct: int, num_scored: int) -> tuple[float, float]:
    """Compute the 95% interval of a share (Wilson 1927), which holds for shares of 0 and 1 and for few trials, too."""
    z, n, share = NORMAL_QUANTILE, num_scored, num_correct / num_scored
    center = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((center + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return min(low, share), max(high, share)  # they enclose it but for rounding


def compute_distinct_share(tokens: list[int], length: int = 4) -> float:
    """Return the share of distinct n-grams among all n-grams of `length`; 1 if there are none."""
    grams = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0

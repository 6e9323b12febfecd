"""From decoded prompts to numbers: ratios of sums, the gain with its interval, loops. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora.evaluation.records import AR, LINEAR, LINEAR_ADAPTER, MODES, Agreement, DecodedPrompt

CONFIDENCE = 0.95


@dataclass(frozen=True)
class ModeNumbers:
    """What one mode did on all prompts of a group.

    new_tokens, num_forwards, seconds: totals; prefills are forwards and take seconds. tokens_per_forward,
    tokens_per_second: their ratios. acceptance_length: mean tokens of a draft-verify cycle, the verifier's included;
    None without cycles. num_equal, num_ties, num_rounded, num_different: prompts by Agreement with greedy AR.
    """

    new_tokens: int
    num_forwards: int
    seconds: float
    tokens_per_forward: float
    tokens_per_second: float
    acceptance_length: float | None
    num_equal: int
    num_ties: int
    num_rounded: int
    num_different: int

    @property
    def equals_greedy_ar(self) -> bool:
        """Every prompt's tokens are AR's, or differ first where AR's two best logits tie."""
        return not (self.num_rounded or self.num_different)


@dataclass(frozen=True)
class GroupNumbers:
    """modes: by lora.evaluation.records.MODES. gain_percent: of tokens per forward, by the adapter.

    interval: 95% bootstrap interval of the gain over prompts, in percent; None with a single prompt.
    distinct_4grams: mean share of different 4-grams in AR's outputs; a low one is a loop, which flatters drafts.
    """

    num_prompts: int
    modes: dict[str, ModeNumbers]
    gain_percent: float
    interval: tuple[float, float] | None
    distinct_4grams: float


def summarize(decoded: Sequence[DecodedPrompt], resamples: int, seed: int) -> GroupNumbers:
    """Numbers of one or more prompts."""
    modes = {mode: _summarize_mode(decoded, mode) for mode in MODES}
    counts = {
        mode: np.array([(len(d.decoded[mode].tokens), d.decoded[mode].num_forwards) for d in decoded])
        for mode in (LINEAR, LINEAR_ADAPTER)
    }
    before, after = counts[LINEAR], counts[LINEAR_ADAPTER]
    return GroupNumbers(
        num_prompts=len(decoded),
        modes=modes,
        gain_percent=float(compute_gain_percent(before.sum(0), after.sum(0))),
        interval=bootstrap_gain(before, after, resamples, seed),
        distinct_4grams=sum(compute_distinct_share(d.decoded[AR].tokens) for d in decoded) / len(decoded),
    )


def _summarize_mode(decoded: Sequence[DecodedPrompt], mode: str) -> ModeNumbers:
    outputs = [d.decoded[mode] for d in decoded]
    new_tokens, num_forwards = sum(len(o.tokens) for o in outputs), sum(o.num_forwards for o in outputs)
    seconds, cycles = sum(o.seconds for o in outputs), sum(o.num_cycles for o in outputs)
    agreements = [Agreement.equal if mode == AR else d.agreements[mode] for d in decoded]
    return ModeNumbers(
        new_tokens=new_tokens,
        num_forwards=num_forwards,
        seconds=seconds,
        tokens_per_forward=new_tokens / num_forwards,
        tokens_per_second=new_tokens / seconds,
        acceptance_length=(new_tokens - len(outputs)) / cycles if cycles else None,  # the prefill emits one
        num_equal=agreements.count(Agreement.equal),
        num_ties=agreements.count(Agreement.tie),
        num_rounded=agreements.count(Agreement.rounded),
        num_different=agreements.count(Agreement.different),
    )


def compute_gain_percent(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Relative gain of tokens per forward in percent; both are [..., (new tokens, forwards)]."""
    return 100 * (after[..., 0] / after[..., 1] / (before[..., 0] / before[..., 1]) - 1)


def bootstrap_gain(before: np.ndarray, after: np.ndarray, resamples: int, seed: int) -> tuple[float, float] | None:
    """Percentile interval of compute_gain_percent over prompts drawn with replacement, each with both its counts.

    before, after: [N, (new tokens, forwards)]. None for N = 1, of which nothing can be learnt.
    """
    if len(before) == 1:
        return None
    generator = np.random.default_rng(seed)
    both = np.concatenate((before, after), axis=1)
    sums = np.stack([both[generator.integers(len(both), size=len(both))].sum(0) for _ in range(resamples)])
    gains = compute_gain_percent(sums[:, :2], sums[:, 2:])
    low, high = np.quantile(gains, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def compute_distinct_share(tokens: list[int], length: int = 4) -> float:
    """Share of different n-grams among all n-grams of `length`; 1 where there is none."""
    grams = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0

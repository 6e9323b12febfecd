"""How an evaluation decodes, scores and resamples. Imports no torch, so that --help can show the defaults quickly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationOptions:
    """The settings shared by all modes; a mode ignores the ones it does not use.

    Attributes:
        max_new_tokens: most tokens of one response.
        batch_size: prompts decoded together.
        block_length: tokens per block; None takes the checkpoint's block_size.
        threshold: block_diffusion commits tokens at least this probable, and a speculative draft ends before a less
            probable token; None takes each mode's default.
        temperature: 0 decodes greedily.
        top_k: sample from so many most probable tokens; None keeps all.
        top_p: sample from the fewest tokens that together have this probability; None keeps all.
        seed: seed of sampling; prompt i of the run adds i.
        mask_groups: mask groups of quadratic speculation; None computes all.
        thinking_budget: most tokens spent on thinking; None sets no limit.
        answer_pattern: regular expression that finds the answer in a response; see judging.py.
        speed_of_light: also measure the ceiling of parallel decoding.
        keep_texts: also write the responses to the report.
        resamples: bootstrap resamples of the prompts for a confidence interval.
        resampling_seed: seed of those resamples.
    """

    max_new_tokens: int = 128
    batch_size: int = 1
    block_length: int | None = None
    threshold: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    mask_groups: int | None = None
    thinking_budget: int | None = None
    answer_pattern: str | None = None
    speed_of_light: bool = False
    keep_texts: bool = False
    resamples: int = 2000
    resampling_seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is deterministic."""
        return self.temperature == 0

"""How an evaluation decodes, scores and resamples. Imports no torch, so that --help can show the defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationOptions:
    """What is the same for all modes; a mode ignores what it has no use for.

    max_new_tokens: of one response. batch_size: prompts decoded together. block_length: tokens; None is the
    checkpoint's block_size. threshold: block_diffusion commits at this probability, speculative drafts end before less
    probable tokens; None is each mode's own. temperature: 0 is greedy. seed: of sampling; prompt i of the run adds i.
    mask_groups: of quadratic; None is all. thinking_budget: tokens at most; None is no limit.
    answer_pattern: see scoring.py. speed_of_light: also measure the ceiling. keep_texts: also keep what was written.
    resamples, resampling_seed: of the prompts, for confidence intervals.
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

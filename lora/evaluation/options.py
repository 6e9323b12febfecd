"""How an evaluation decodes and resamples. Imports no torch, so that --help can show the defaults."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationOptions:
    """max_new_tokens: of one answer. block_length: tokens of a drafted block; None is the checkpoint's block_size.

    resamples: of the prompts, for the confidence interval. seed: of the resampling; decoding is greedy.
    """

    max_new_tokens: int = 128
    block_length: int | None = None
    resamples: int = 2000
    seed: int = 0

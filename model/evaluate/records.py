"""What passes between the parts of an evaluation: prompts, and what decoding them gave. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# The names of the shipped decoding modes, for whatever must not import torch to know them.
MODES = AR, BLOCK_DIFFUSION, LINEAR, QUADRATIC = "ar", "block_diffusion", "linear", "quadratic"
SPECULATIVE = (LINEAR, QUADRATIC)
LINEAR_ADAPTER, QUADRATIC_ADAPTER = (f"{mode}+adapter" for mode in SPECULATIVE)


class Agreement(Enum):
    """Tokens against greedy AR's.

    tie: the first difference lies where AR's two best logits are too close to call. rounded: a difference in a dtype
    of few bits, in which nothing is promised.
    """

    equal = "equal"
    tie = "tie"
    rounded = "rounded"
    different = "different"


@dataclass(frozen=True)
class Variant:
    """One way to decode: a mode, without or with the draft adapter, at the given threshold or the run's own (None)."""

    mode: str
    with_adapter: bool = False
    threshold: float | None = None

    @property
    def name(self) -> str:
        """Such as linear, linear+adapter, block_diffusion@0.9."""
        adapter = "+adapter" if self.with_adapter else ""
        return f"{self.mode}{adapter}" + ("" if self.threshold is None else f"@{self.threshold:g}")

    @property
    def is_lossless(self) -> bool:
        """Whether greedy outputs must be greedy AR's."""
        return self.mode != BLOCK_DIFFUSION


@dataclass(frozen=True)
class Prompt:
    """token_ids: one or more. place: file and line, for messages about it. answers: accepted ones; None: not scored."""

    token_ids: list[int]
    group: str
    place: str
    answers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Decoded:
    """One call of a decoder for a batch of prompts.

    tokens: new ones of each prompt, the stop token included. forwards: model calls of the batch by kind. num_rows:
    token rows the layers computed, over all prompts. num_proposed, num_committed: tokens predicted, and of those kept.
    acceptance_lengths: tokens emitted by each cycle of draft and verification, the verifier's included.
    seconds: until all prompts were done.
    """

    tokens: list[list[int]]
    forwards: dict[str, int]
    num_rows: int
    num_proposed: int
    num_committed: int
    acceptance_lengths: list[int]
    seconds: float

    @property
    def num_forwards(self) -> int:
        """Model calls, the prefill included."""
        return sum(self.forwards.values())


@dataclass(frozen=True)
class DecodedBatch:
    """Prompts that were decoded together, in every variant; all dictionaries are by its name.

    agreements: with greedy AR, per prompt; empty if decoding is sampled. correct: per prompt whether the text comes to
    an accepted answer, None for a prompt without answers; empty if none has any. texts: per prompt; empty unless kept.
    """

    prompts: Sequence[Prompt]
    decoded: dict[str, Decoded]
    agreements: dict[str, list[Agreement]]
    correct: dict[str, list[bool | None]]
    texts: dict[str, list[str]]

    @property
    def group(self) -> str:
        """That of all its prompts."""
        return self.prompts[0].group


def choose_variants(modes: Sequence[str], *, has_adapter: bool, thresholds: Sequence[float] = ()) -> list[Variant]:
    """Each mode once, speculative ones also with the adapter if there is one; then all but ar at every threshold.

    Speculation also at 0, its default: where nothing is cut off the drafts.
    """
    variants = []
    for mode in dict.fromkeys(modes):
        variants.append(Variant(mode))
        if has_adapter and mode in SPECULATIVE:
            variants.append(Variant(mode, with_adapter=True))
    swept = [variant for variant in variants if variant.mode != AR]
    points = {mode: dict.fromkeys((0.0, *thresholds) if mode in SPECULATIVE else thresholds) for mode in modes}
    return variants + [Variant(v.mode, v.with_adapter, t) for v in swept if thresholds for t in points[v.mode]]

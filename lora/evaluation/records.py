"""What passes between the parts of an evaluation: prompts, and what decoding them gave. Imports no torch."""

from dataclasses import dataclass
from enum import Enum

AR, LINEAR, LINEAR_ADAPTER = "ar", "linear_speculation", "linear_speculation_adapter"
MODES = (AR, LINEAR, LINEAR_ADAPTER)
SPECULATIVE = (LINEAR, LINEAR_ADAPTER)


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
class Prompt:
    """token_ids: one or more. place: file and line, for messages about it."""

    token_ids: list[int]
    group: str
    place: str


@dataclass(frozen=True)
class Decoded:
    """tokens: new ones, the stop token included. num_forwards: model calls. num_cycles: of draft and verification."""

    tokens: list[int]
    num_forwards: int
    num_cycles: int
    seconds: float


@dataclass(frozen=True)
class DecodedPrompt:
    """decoded: by MODES. agreements: of SPECULATIVE modes with AR."""

    prompt: Prompt
    decoded: dict[str, Decoded]
    agreements: dict[str, Agreement]

"""The adapters that are compared: each a set of overrides of `python -m lora.train experiment=medium`."""

from dataclasses import dataclass
from pathlib import Path

from tests.bench.medium import ROOT

SHORT_STEPS = 80  # of the comparison at equal steps


@dataclass(frozen=True)
class Variant:
    """name: of the run. overrides: what differs from experiment=medium."""

    name: str
    overrides: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        """The folder it trains in."""
        return ROOT / "drafters" / self.name

    @property
    def adapter(self) -> Path:
        """The folder its adapter is written to."""
        return self.run_dir / "adapter"

    def command(self, python: str) -> list[str]:
        """Return the training command as a user would type it."""
        return [python, "-m", "lora.train", "experiment=medium", f"run.dir={self.run_dir}", *self.overrides]


def _objective(loss: str, weights: str) -> Variant:
    overrides = (f"objective.loss={loss}", f"objective.position_weights={weights}", f"train.steps={SHORT_STEPS}")
    return Variant(f"{loss}_{weights}", overrides)


def _source(source: str) -> Variant:
    # As many prompts as there are sequences in so many steps.
    prompts = 8 * SHORT_STEPS
    overrides = (f"responses.source={source}", f"responses.prompts={prompts}", f"train.steps={SHORT_STEPS}")
    return Variant(f"text_{source}", overrides)


# The published rank, and the published ratio of rank to hidden size (8B: 128 / 4096); hidden is 512 here.
MAIN = (
    Variant("rank_128", ("adapter.rank=128", "adapter.alpha=512")),
    # Learns more slowly, so twice as long.
    Variant("rank_16", ("adapter.rank=16", "adapter.alpha=64", "train.steps=1600")),
)
DEFAULT_OBJECTIVE = "argmax_reach"
# In greedy responses, where the text is the verifier's choice, `data` and `argmax` are the same loss.
OBJECTIVES = (
    _objective("argmax", "reach"),
    _objective("data", "none"),
    _objective("kl", "reach"),
    _objective("kl", "none"),
    _objective("tv", "none"),
    _objective("hybrid", "reach"),
    _objective("expected_length", "none"),
)
TEXTS = (_source("given"), _source("sampled"))  # greedy is the first of the objectives

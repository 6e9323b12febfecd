"""The adapters that are compared: each a set of overrides of `python -m lora.train experiment=medium`."""

from dataclasses import dataclass
from pathlib import Path

from tests.bench.medium import BenchModel

STEPS = 150  # of every comparison at equal steps
LONG_STEPS = 800
PROMPTS = 1536  # that get a response, shared by all; the short trainings see no response twice


@dataclass(frozen=True)
class Variant:
    """name: of the run. overrides: what differs from experiment=medium. steps: of its training."""

    name: str
    overrides: tuple[str, ...] = ()
    steps: int = STEPS

    def folder(self, model: BenchModel) -> Path:
        """Return the folder it trains in."""
        return model.folder / "drafters" / self.name

    def adapter(self, model: BenchModel) -> Path:
        """Return the folder its adapter is written to."""
        return self.folder(model) / "adapter"

    def command(self, model: BenchModel, python: str) -> list[str]:
        """Return the training command as a user would type it."""
        return [
            *(python, "-m", "lora.train", "experiment=medium", f"run.root={model.root}"),
            *(f"run.dir={self.folder(model)}", f"train.steps={self.steps}", f"responses.prompts={PROMPTS}"),
            *("evaluation.every_steps=0", "checkpointing.every_steps=50", "runtime.dtype=fp32"),
            *self.overrides,
        ]


def _verified(name: str, *numbers: str) -> Variant:
    return Variant(name, ("objective.loss=verified", *(f"objective.verified.{number}" for number in numbers)))


OURS = Variant("ours", ("objective.loss=argmax", "objective.position_weights=reach"))
REPORT = _verified("report")
OBJECTIVES = (
    OURS,
    REPORT,
    _verified("report_without_sampling", "sampled_share=0"),
    _verified("report_without_active_positions", "positions=all"),
    _verified("report_without_cross_entropy", "argmax_weight=0"),
    _verified("report_without_truncation", "support=null"),
    _verified("report_without_matching", "matching_weight=0"),
    Variant("kl_reach", ("objective.loss=kl", "objective.position_weights=reach")),
)
TEXTS = (OURS, *(Variant(f"text_{source}", (f"responses.source={source}",)) for source in ("given", "sampled")))
# The published rank, and the published ratio of rank to hidden size of the medium model (8B: 128 / 4096).
RANKS = (
    Variant("rank_128", ("adapter.rank=128", "adapter.alpha=512"), LONG_STEPS),
    Variant("rank_16", ("adapter.rank=16", "adapter.alpha=64"), LONG_STEPS),
)
PARTS = {"objectives": OBJECTIVES, "texts": TEXTS, "ranks": RANKS}

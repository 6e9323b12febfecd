"""Worker: runs each job of a JSON file on data of which some samples are poisoned.

A job: {"overrides": [...], "poison": {sample index: factor of its loss, null for NaN}, "slow_rank": rank that waits in
every step, "hangs_at": samples seen when it waits for good}. A poisoned sample multiplies the loss of its microbatch,
and so the gradients. What a user would read of a failure goes to <run.dir>/error_rank<r>.txt; <run.dir>/went_back
appears when a run goes back.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.worker import take_jobs, train_or_tell

WAIT_SECONDS, FOREVER = 0.2, 1000.0


def main() -> None:
    """Run the jobs of argv[1] in order."""
    from data_pipeline.loader import BatchLoader
    from pretrain.reporting.run_report import RunReport
    from pretrain.step.microbatches import MicrobatchBuilder

    job: dict[str, Any] = {}
    builder, loader = vars(MicrobatchBuilder), vars(BatchLoader)
    MicrobatchBuilder.prepare = poisoning(builder["prepare"], job)
    BatchLoader.microbatches = waiting(loader["microbatches"], job)
    RunReport.go_back = marking(vars(RunReport)["go_back"])
    for each in take_jobs():
        job.clear()
        job.update(each)
        train_or_tell(job["overrides"])


def poisoning(prepare: Callable[..., Any], job: dict[str, Any]) -> Callable[..., Any]:
    """Return a `MicrobatchBuilder.prepare` that makes bad what the job calls bad."""

    def poisoned(self: Any, batches: Iterable[Any]) -> Any:
        batches = list(batches)
        step = prepare(self, batches)
        if self.noise.split == "heldout":
            return step
        poison = job.get("poison", {})
        both = zip(step.microbatches, batches, strict=True)
        return replace(step, microbatches=[_poison(microbatch, batch, poison) for microbatch, batch in both])

    return poisoned


def _poison(microbatch: Any, batch: Any, poison: dict[str, float | None]) -> Any:
    for index in batch.sample_indices.tolist():
        if str(index) in poison:
            factor = poison[str(index)]
            weights = microbatch.scored.weights * (float("nan") if factor is None else factor)
            microbatch = replace(microbatch, scored=replace(microbatch.scored, weights=weights))
    return microbatch


def waiting(microbatches: Callable[..., Any], job: dict[str, Any]) -> Callable[..., Any]:
    """Return a `BatchLoader.microbatches` that takes its time on the slow rank."""

    def slow(self: Any, first: int) -> Any:
        import torch.distributed as dist

        if job.get("slow_rank") == dist.get_rank():
            time.sleep(FOREVER if job.get("hangs_at") == first else WAIT_SECONDS)
        return microbatches(self, first)

    return slow


def marking(go_back: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `RunReport.go_back` that leaves a file in the run folder."""

    def marked(self: Any, state: Any) -> None:
        go_back(self, state)
        Path(self._session.run_dir, "went_back").touch()

    return marked


if __name__ == "__main__":
    main()

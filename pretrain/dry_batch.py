"""Try one step with the largest shapes, for launch/preflight: `python -m pretrain.dry_batch CONFIG --microbatches N`.

CONFIG: a resolved config.yaml in a folder that may be written; `report.json` appears beside it. Weights are fresh: what
is tried is whether model, optimizer and batches fit and work. Of the run folder that it names only the kernels are
written (runtime.compile_cache), so that the run need not compile them again.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.composition.compose import load_run_config
from conf.schema import ResumeConfig, RunConfig, RunFolderConfig
from conf.system.atomic import atomic_write_text
from conf.system.entry import OneLineParser, count, exit_status, quiet_libraries

if TYPE_CHECKING:
    from data_pipeline.batch import Batch
    from data_pipeline.dataset import Blend
    from pretrain.run.session import RunSession
    from pretrain.trainer import Trainer

REPORT_FILE = "report.json"


def main() -> None:
    """Exit with status 0, or 2 after one message for what the user can fix."""
    parser = OneLineParser(prog="python -m pretrain.dry_batch", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--microbatches", type=count, required=True, help="per data-parallel rank")
    sys.exit(exit_status(lambda: run(parser.parse_args())))


def run(arguments: argparse.Namespace) -> None:
    """Train two steps, evaluate one microbatch and write the report. Raises: UserError."""
    config = load_run_config(arguments.config)
    quiet_libraries("torch.distributed")

    from pretrain.assemble import build_trainer
    from pretrain.resume.start_point import StartPoint
    from pretrain.run.model_parallel import model_parallel_groups
    from pretrain.run.run_data import open_data
    from pretrain.run.session import RunSession
    from pretrain.step.userbuffers import userbuffers

    data = open_data(config)
    run_dir = arguments.config.parent / "run"
    quiet = replace(config.runtime, tensorboard=False, wandb_project=None, progress_bar=False)
    groups = model_parallel_groups(config.parallel, config.runtime.timeout_minutes, config.train.seed)
    with RunSession(run_dir, quiet) as session, groups, userbuffers(config):
        copies = session.ranks.world_size // config.parallel.model_parallel
        small = replace(shrink(config, run_dir, arguments.microbatches, copies), runtime=quiet)
        assert data.tokenizer.eos_token_id is not None, "open_data checks it"
        trainer = build_trainer(small, data, StartPoint(data.tokenizer.eos_token_id), session)
        report = describe(session, small, measure(trainer), arguments.microbatches)
        report |= asdict(trainer.report.kernels.counts)
        trainer.report.kernels.save()
        if session.ranks.is_first:
            atomic_write_text(arguments.config.parent / REPORT_FILE, json.dumps(report) + "\n")


def shrink(config: RunConfig, run_dir: Path, num_microbatches: int, copies: int) -> RunConfig:
    """Return the run with so few sequences per step, in a folder of its own."""
    train = config.train
    return replace(
        config,
        train=replace(train, global_batch_size=num_microbatches * copies * train.micro_batch_size),
        evaluation=replace(config.evaluation, sequences=copies * train.micro_batch_size),
        run=RunFolderConfig(root=str(run_dir.parent), name=run_dir.name, dir=str(run_dir)),
        resume=ResumeConfig(),
        init_from=None,
    )


@dataclass(frozen=True)
class Measured:
    """Holds seconds of the step with the largest shapes, and of a held-out microbatch where there is one."""

    step_seconds: float
    heldout_seconds: float | None


def measure(trainer: "Trainer") -> Measured:
    """Time the second step; the first one, on the run's own sequences, allocates what the second one works beside."""
    trainer.prepare_kernels()
    trainer.train_step()
    lengthen(trainer)
    step_seconds = _time(trainer.train_step)
    return Measured(step_seconds, None if trainer.evaluation is None else _time(trainer.evaluate))


@dataclass(frozen=True)
class LongestBlend:
    """Lays out the tokens of `blend` as sequences of the largest cost: each one document, every token scored.

    It is for trying out memory and time, never for training.
    """

    blend: "Blend"

    def build_batch(self, sample_indices: Sequence[int]) -> "Batch":
        """Return a Batch [B, S]."""
        import torch

        batch = self.blend.build_batch(sample_indices)
        block_size = next(iter(self.blend.sources.values())).form.block_size
        position_ids = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens).contiguous()
        layout = replace(
            batch.layout,
            document_ids=torch.zeros_like(batch.document_ids),
            block_ids=position_ids // block_size,
            position_ids=position_ids,
            block_padding=torch.zeros_like(batch.block_padding),
        )
        return replace(batch, layout=layout, loss_mask=torch.ones_like(batch.loss_mask))


def lengthen(trainer: "Trainer") -> None:
    """Make every sequence one document without padding, and every forward whole: most positions, scored ones, pairs."""
    trainer.builder = replace(trainer.builder, noisy_lengths=trainer.builder.noisy_lengths[-1:])
    longest: Any = LongestBlend(trainer.loader.blend)
    trainer.loader = replace(trainer.loader, blend=longest, prefetch_steps=0, dealer=None, _ahead={})


def describe(session: "RunSession", config: RunConfig, measured: Measured, num_microbatches: int) -> dict[str, Any]:
    """Return what preflight reads. All ranks call this together: memory is that of the fullest."""
    import torch

    from pretrain.run.metrics import load_metrics, measure_memory_bytes
    from pretrain.run.process_group import gather_over_ranks

    ranks, device = session.ranks, session.ranks.device
    peaks = gather_over_ranks(lambda: measure_memory_bytes(device))
    is_cuda = device.type == "cuda"
    losses = [line["loss"] for line in load_metrics(config.run.dir, "train")] if ranks.is_first else []
    return {
        "world_size": ranks.world_size,
        "num_microbatches": num_microbatches,
        "micro_batch_size": config.train.micro_batch_size,
        "sequence_length": config.data.sequence_length,
        "step_seconds": measured.step_seconds,
        "heldout_seconds": measured.heldout_seconds,
        "peak_memory_bytes": max(peaks),
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if is_cuda else None,
        "losses": losses,
        "is_finite": all(math.isfinite(loss) for loss in losses),
    }


def _time(action: Callable[[], object]) -> float:
    """Return seconds; what trainers do ends with numbers on the CPU, so the device is done then."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

"""The training loop of a draft adapter: a step and an evaluation on a RunSession."""

import logging
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema.drafter import DrafterConfig
from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from lora.drafter.adapter import save_adapter
from lora.drafter.adapter_folder import check_output, is_written, output_folder, read_run_id
from lora.drafter.batches import DraftBatch, DraftBatches
from lora.drafter.checkpoint_manifest import FixedSettings, describe_state
from lora.drafter.engine import EngineFiles, gather_adapter
from lora.drafter.scoring import NUM_DRAFT_SUMS
from model.checkpoint.layout import MANIFEST_NAME
from pretrain.run import stop
from pretrain.run.metrics import measure_memory_bytes
from pretrain.run.process_group import run_on_first_rank
from pretrain.run.run_folder import plain
from pretrain.run.run_status import TrainState
from pretrain.run.session import RunSession
from pretrain.run.terminal import ProgressBar, describe_values
from pretrain.step.learning_rate import compute_learning_rate

logger = logging.getLogger(__name__)

LOGGED_VALUES = ("loss", "acceptance_length", "acceptance_length_sampled", "grad_norm", "lr", "blocks_per_second")
RECORDED_PACKAGES = ("torch", "transformers", "peft", "deepspeed")  # with their versions in drafter.json


@dataclass
class DrafterTrainer:
    """One run in progress. engine: DeepSpeed's, around a DraftStep."""

    config: DrafterConfig
    session: RunSession
    fixed: FixedSettings
    engine: Any
    files: EngineFiles
    state: TrainState
    batches: DraftBatches
    heldout: DraftBatches
    bar: ProgressBar

    def run(self) -> int:
        """Train to the last step, evaluate and save on the way and at the end, and write the adapter.

        A signal ends the run earlier, with everything saved and no adapter written.

        Returns: the exit status of the process.
        """
        done_before = self.is_finished
        with stop.deferred(), self.bar.show(self.config.train.steps, self.state.step):
            if self.state.step == 0:
                self.evaluate()
            while not self.is_finished:
                self.train_step()
                signal = self.session.agree_on_signal()
                if signal or self._is_due(self.config.checkpointing.every_steps):
                    self.save()
                if signal:
                    logger.warning(f"step {self.state.step}: {signal.name} received: saved, ending")
                    return stop.STATUS[signal]
                if self._is_due(self.config.evaluation.every_steps):
                    self.evaluate()
        if not is_written(self.config, self.state.step):
            self.write_adapter()
        more = "; nothing was left to do (more train.steps would continue it)" if done_before else ""
        logger.info(
            f"{self.session.run_dir}: complete at step {self.state.step}; the adapter is in "
            f"{output_folder(self.config)}{more}"
        )
        return 0

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.config.train.steps

    def _is_due(self, every_steps: int) -> bool:
        return self.is_finished or self.state.is_multiple_of(every_steps)

    def train_step(self) -> None:
        """Run one optimizer step on the next global batch."""
        started = time.perf_counter()
        count = self.config.train.global_batch_size
        batches = self._draw(self.batches, self.state.samples_seen, count)
        counts = [[batch.num_tokens, batch.num_blocks] for batch in batches]
        num_tokens, num_blocks = self._add_up(torch.tensor(counts).sum(0)).tolist()
        learning_rate = compute_learning_rate(self.config.schedule, (self.state.step + 1) / self.config.train.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed averages over microbatches and ranks; the loss is a mean over all blocks of the global batch.
        scale = len(batches) * dist.get_world_size() / max(num_blocks, 1)
        sums = self._new_sums()
        for batch in batches:
            loss, batch_sums = self.engine(batch.to(self.session.ranks.device))
            self.engine.backward(loss * scale)
            self.engine.step()
            sums += batch_sums
        self.state.step += 1
        self.state.samples_seen += count
        self.state.tokens_seen += num_tokens
        sums = self._add_up(sums)  # waits for the device
        self._report_step(sums, learning_rate, time.perf_counter() - started)

    def evaluate(self) -> None:
        """Measure acceptance on held-out blocks, for metrics and log."""
        count = dist.get_world_size() * self.config.train.micro_batch_size
        sums = self._new_sums()
        with torch.no_grad():
            # Whole rounds over all ranks; after the last sequence nothing counts.
            for first in range(0, self.heldout.num_examples, count):
                for batch in self._draw(self.heldout, first, count):
                    sums += self.engine(batch.to(self.session.ranks.device))[1]
        values = _describe_sums(self._add_up(sums))
        self.session.metrics.write("heldout", self.state.step, self.state.tokens_seen, values)
        logger.info(
            f"step {self.state.step}: held-out acceptance length {values['acceptance_length']:.3f} (greedy), "
            f"{values['acceptance_length_sampled']:.3f} (sampled)"
        )

    def save(self) -> None:
        """Save a checkpoint of this moment. Raises: SaveError on every rank if one fails."""
        text = describe_state(self.state, self.fixed)
        self.session.save_step(
            self.state.step,
            self.config.checkpointing.keep,
            self.files.write,
            lambda folder: atomic_write_text(folder / MANIFEST_NAME, text),
        )

    def write_adapter(self) -> None:
        """Write the adapter in PEFT's format, where the checkpoint's users look for it. Raises: UserError."""
        tensors = gather_adapter(self.engine)
        record = {
            "run_id": read_run_id(Path(self.config.run.dir)),
            "step": self.state.step,
            "tokens_seen": self.state.tokens_seen,
            **asdict(self.fixed),
            "objective": plain(self.config.objective),
            "answers": self.config.responses.source.value,  # the key since the first adapters
            "versions": {name: version(name) for name in RECORDED_PACKAGES},
        }
        run_on_first_rank(lambda: self._write_adapter(tensors, record))

    def _write_adapter(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        check_output(self.config)
        output = output_folder(self.config)
        try:
            save_adapter(self.engine.module.model, tensors, output, record)
        except OSError as error:
            raise UserError(
                f"the adapter cannot be written to {output}: {error}. Nothing is lost: fix the cause, or choose "
                "another folder with output=, and give the same command again"
            ) from error

    def _draw(self, batches: DraftBatches, first: int, count: int) -> list[DraftBatch]:
        """Return this rank's microbatches, with as many blocks per sequence as any sequence of any rank has."""
        drawn = batches.draw(first, count, dist.get_rank(), dist.get_world_size())
        most = torch.tensor(
            max(int(batch.scored[..., 0].sum(1).max()) for batch in drawn), device=self.session.ranks.device
        )
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [batch.trim(max(int(most), 1)) for batch in drawn]

    def _new_sums(self) -> Tensor:
        return torch.zeros(NUM_DRAFT_SUMS, dtype=torch.float64, device=self.session.ranks.device)

    def _add_up(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, on the CPU."""
        values = values.to(self.session.ranks.device)
        dist.all_reduce(values)
        return values.cpu()

    def _report_step(self, sums: Tensor, learning_rate: float, seconds: float) -> None:
        """Write the step to metrics, bar and log. Raises: UserError if the loss is not finite."""
        step = self.state.step
        if not torch.isfinite(sums).all():
            raise UserError(
                f"the loss of step {step} is not finite: lower schedule.peak_lr, or take runtime.dtype=fp32; the same "
                "command continues from the newest checkpoint"
            )
        grad_norm = self.engine.get_global_grad_norm()  # None without ZeRO, which does not keep it
        values = {
            **_describe_sums(sums),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "lr": learning_rate,
            "step_seconds": seconds,
            "blocks_per_second": float(sums[1]) / seconds,
            "memory_bytes": measure_memory_bytes(self.session.ranks.device),
        }
        self.session.metrics.write("train", step, self.state.tokens_seen, values)
        self.bar.update(step, f"loss {values['loss']:.4f} · {values['acceptance_length']:.2f} tokens a cycle")
        if step % self.config.runtime.log_every_steps == 0:
            logger.info(f"step {step}: {describe_values(values, LOGGED_VALUES)}")


def _describe_sums(sums: Tensor) -> dict[str, float | int | None]:
    """Turn sums [NUM_DRAFT_SUMS] over blocks into loss per block and tokens per draft-verify cycle.

    The bonus token is included.
    """
    loss, blocks, greedy, sampled = sums.tolist()
    blocks = max(blocks, 1.0)
    return {
        "loss": loss / blocks,
        "acceptance_length": 1 + greedy / blocks,
        "acceptance_length_sampled": 1 + sampled / blocks,
        "blocks": int(blocks),
    }

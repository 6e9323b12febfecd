"""The training loop of a draft adapter."""

import logging
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.schema.drafter import DrafterConfig
from conf.system.errors import UserError
from lora.drafter.adapter import save_adapter
from lora.drafter.adapter_folder import check_output, is_written, output_folder, read_run_id
from lora.drafter.batches import DraftBatch, DraftBatches
from lora.drafter.checkpoint_manifest import FixedSettings, describe_state
from lora.drafter.console import DrafterConsole
from lora.drafter.engine import EngineCheckpoints, gather_adapter
from lora.drafter.step import NUM_DRAFT_SUMS
from pretrain.run import stop
from pretrain.run.metrics import MetricsWriter, measure_memory_bytes
from pretrain.run.process_group import run_on_first_rank
from pretrain.run.run_folder import plain
from pretrain.run.run_status import TrainState
from pretrain.step.learning_rate import compute_learning_rate

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "peft", "deepspeed")


@dataclass
class DrafterTrainer:
    """One run in progress. engine: DeepSpeed's, around a DraftStep."""

    config: DrafterConfig
    facts: FixedSettings
    engine: Any
    state: TrainState
    batches: DraftBatches
    heldout: DraftBatches
    checkpoints: EngineCheckpoints
    metrics: MetricsWriter | None
    console: DrafterConsole
    device: torch.device

    def run(self) -> int:
        """Trains to the last step; evaluates and saves on the way and at the end, where the adapter is written.

        A signal ends it earlier: with everything saved, and no adapter written. Returns the exit status of the process.
        """
        try:
            return self._train()
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _train(self) -> int:
        done_before = self.is_finished
        with stop.deferred(), self.console.steps(self.state):
            if self.state.step == 0:
                self.evaluate()
            while not self.is_finished:
                self.train_step()
                signal = self._agree_on_signal()
                if signal or self._is_due(self.config.checkpointing.every_steps):
                    self.save()
                if signal:
                    logger.warning(f"step {self.state.step}: {signal.name} received: saved, ending")
                    return stop.STATUS[signal]
                if self._is_due(self.config.evaluation.every_steps):
                    self.evaluate()
        if not is_written(self.config, self.state.step):
            self.write_adapter()
        self.console.say_end(self.state, str(output_folder(self.config)), done_before)
        return 0

    def _agree_on_signal(self) -> Signals | None:
        """What some rank was sent, on every rank."""
        number = torch.tensor(stop.received() or 0, device=self.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return Signals(int(number)) if number else None

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.config.train.steps

    def train_step(self) -> None:
        """One optimizer step on the next global batch."""
        started = time.perf_counter()
        count = self.config.train.global_batch_size
        batches = self._draw(self.batches, self.state.samples_seen, count)
        held = [[batch.num_tokens, batch.num_blocks] for batch in batches]
        num_tokens, num_blocks = self._add_up(torch.tensor(held).sum(0)).tolist()
        learning_rate = self._learning_rate()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed averages over microbatches and ranks; the loss is a mean over all blocks of the global batch.
        scale = len(batches) * dist.get_world_size() / max(num_blocks, 1)
        sums = torch.zeros(NUM_DRAFT_SUMS, dtype=torch.float64, device=self.device)
        for batch in batches:
            loss, counts = self.engine(batch.to(self.device))
            self.engine.backward(loss * scale)
            self.engine.step()
            sums += counts
        self.state.step += 1
        self.state.samples_seen += count
        self.state.tokens_seen += num_tokens
        sums = self._add_up(sums)  # waits for the device
        self._report(sums, learning_rate, time.perf_counter() - started)

    def evaluate(self) -> None:
        """Acceptance on held-out blocks, into metrics and console."""
        count = dist.get_world_size() * self.config.train.micro_batch_size
        sums = torch.zeros(NUM_DRAFT_SUMS, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            # Whole rounds over all ranks; behind the last sequence nothing counts.
            for first in range(0, self.heldout.num_examples, count):
                for batch in self._draw(self.heldout, first, count):
                    sums += self.engine(batch.to(self.device))[1]
        values = _describe_sums(self._add_up(sums))
        if self.metrics is not None:
            self.metrics.write("heldout", self.state.step, self.state.tokens_seen, values)
        self.console.say_heldout(self.state, values)

    def save(self) -> None:
        """Saves a checkpoint of this moment."""
        self.checkpoints.save(self.state.step, describe_state(self.state, self.facts))

    def write_adapter(self) -> None:
        """The adapter in PEFT's format, where the checkpoint's users look for it."""
        tensors = gather_adapter(self.engine)
        record = {
            "run_id": read_run_id(Path(self.config.run.dir)),
            "step": self.state.step,
            "tokens_seen": self.state.tokens_seen,
            **asdict(self.facts),
            "objective": plain(self.config.objective),
            "answers": self.config.responses.source.value,
            "versions": {name: version(name) for name in PACKAGES},
        }
        run_on_first_rank(lambda: self._write(tensors, record))

    def _write(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        check_output(self.config)
        output = output_folder(self.config)
        try:
            save_adapter(self.engine.module.model, tensors, output, record)
        except OSError as error:
            raise UserError(
                f"the adapter cannot be written to {output}: {error}. Nothing is lost: mend the cause, or choose "
                "another folder with output=, and give the same command again"
            ) from error

    def _draw(self, batches: DraftBatches, first: int, count: int) -> list[DraftBatch]:
        """This rank's microbatches, with as many blocks per sequence as any sequence of any rank has."""
        drawn = batches.draw(first, count, dist.get_rank(), dist.get_world_size())
        most = torch.tensor(max(int(batch.scored[..., 0].sum(1).max()) for batch in drawn), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [batch.trim(max(int(most), 1)) for batch in drawn]

    def _add_up(self, values: Tensor) -> Tensor:
        """The sum over all ranks, on the CPU."""
        values = values.to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def _learning_rate(self) -> float:
        return compute_learning_rate(self.config.schedule, (self.state.step + 1) / self.config.train.steps)

    def _is_due(self, every_steps: int) -> bool:
        return self.is_finished or (every_steps > 0 and self.state.step % every_steps == 0)

    def _report(self, sums: Tensor, learning_rate: float, seconds: float) -> None:
        if not torch.isfinite(sums).all():
            raise UserError(
                f"the loss of step {self.state.step} is not finite: lower schedule.peak_lr, or take "
                "runtime.dtype=fp32; the same command continues from the newest checkpoint"
            )
        grad_norm = self.engine.get_global_grad_norm()  # none without ZeRO, which does not keep it
        values = {
            **_describe_sums(sums),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "lr": learning_rate,
            "step_seconds": seconds,
            "blocks_per_second": float(sums[1]) / seconds,
            "memory_bytes": measure_memory_bytes(self.device),
        }
        if self.metrics is not None:
            self.metrics.write("train", self.state.step, self.state.tokens_seen, values)
        self.console.say_step(self.state, values)


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

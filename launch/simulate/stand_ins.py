"""Build the trainer of one rank: its own model, wrapping, optimizer and schedule, and stand-ins for what is around it.

What stands in: the data (sequences of random tokens in the asked-for form), and everything that writes into a run
folder. Weights are not filled: on the device nothing has numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from conf.schema import Objective, RunConfig
from data_pipeline.batch import Batch, stack_batches
from data_pipeline.loader import BatchLoader
from data_pipeline.packing.form import build_sequence_form
from data_pipeline.packing.sequence import Segments, lay_out
from launch.plan.step_work import SequenceKind, split_into_documents
from model.megatron.build import build_model_chunks
from pretrain.assemble import build_microbatch_builder, build_plans
from pretrain.health.guard import LossGuard
from pretrain.health.heartbeat import Heartbeat
from pretrain.run.run_status import TrainState
from pretrain.step.evaluation import HeldoutEvaluation
from pretrain.step.optimizer import build_optimizer, wrap_data_parallel
from pretrain.trainer import Trainer

MASK_TOKEN_ID, BLOCK_PADDING_TOKEN_ID = 0, 1


@dataclass(frozen=True)
class RandomSequences:
    """Serves sequences as a Blend does: laid out by the same code, their tokens random."""

    config: RunConfig
    kind: SequenceKind

    def build_batch(self, sample_indices: Sequence[int]) -> Batch:
        """Return a Batch [B, S] of the sequences at these global sample indices."""
        config = self.config
        form = build_sequence_form(config.data, config.stage.block_size, config.stage.objective is Objective.joint)
        segments = self._split(form.alignment)
        sequences = [
            lay_out(self._fill(segments, index), form, BLOCK_PADDING_TOKEN_ID, index) for index in sample_indices
        ]
        return stack_batches(sequences)

    def _split(self, alignment: int) -> list[tuple[int, int, bool]]:
        """Return (tokens, document, whether it is a prompt) of each segment that fits a sequence."""
        segments, room = [], self.config.data.sequence_length
        for document, length in enumerate(split_into_documents(self.config, self.kind.document_tokens)):
            prompt = round(length * (1 - self.kind.scored_share))
            for tokens, is_prompt in ((prompt, True), (length - prompt, False)):
                tokens = min(tokens, room)
                if tokens:
                    segments.append((tokens, document, is_prompt))
                    room -= -(-tokens // alignment) * alignment
        return segments

    def _fill(self, segments: list[tuple[int, int, bool]], sample_index: int) -> Segments:
        lengths, documents, is_prompt = (np.array(values) for values in zip(*segments, strict=True))
        generator = np.random.default_rng(sample_index)
        tokens = generator.integers(self.config.model.vocab_size, size=lengths.sum())
        return Segments(tokens, lengths, documents, is_prompt.astype(bool))


class Silent:
    """Takes every call and answers 0: for reports, watchdogs and checkpoints of a run that writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Return a method that does nothing."""
        return lambda *_, **__: 0


def build_rank_trainer(config: RunConfig, kind: SequenceKind, device: torch.device) -> Trainer:
    """Build the trainer as pretrain/assemble.py does, of a run that begins."""
    silent: Any = Silent()
    sequences: Any = RandomSequences(config, kind)
    chunks = build_model_chunks(config.model, config.parallel, config.precision, config.runtime.loss_chunk_rows)
    chunks = [chunk.to(device) for chunk in chunks]
    heartbeat = Heartbeat(device)
    model = wrap_data_parallel(chunks, config.parallel, heartbeat.gradients_ready)
    plans, train = build_plans(config, device), config.train
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    heldout = build_microbatch_builder(config, MASK_TOKEN_ID, plans, "heldout")
    # One place is left over on the last rank: it holds padding.
    num_heldout = min(config.evaluation.sequences, max(1, size * train.micro_batch_size - 1))
    return Trainer(
        config=config,
        model=model,
        optimizer=build_optimizer(model, config.optimizer, config.parallel, config.precision),
        state=TrainState(),
        loader=BatchLoader(sequences, train.global_batch_size, train.micro_batch_size, rank, size),
        builder=build_microbatch_builder(config, MASK_TOKEN_ID, plans, "train"),
        evaluation=HeldoutEvaluation(sequences, heldout, num_heldout, train.micro_batch_size),
        checkpointer=silent,
        guard=LossGuard(config.guard),
        heartbeat=heartbeat,
        watchdog=silent,
        report=silent,
    )

"""Evaluates held-out losses: on the same sequences with the same noise, every time and in every layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from data_pipeline.batch import Batch
from data_pipeline.dataset import Blend
from pretrain.objective.losses import LossStats, StepNumbers, join_numbers
from pretrain.step.microbatches import MicrobatchBuilder
from pretrain.step.schedule import run_schedule


@dataclass(frozen=True)
class HeldoutEvaluation:
    """Evaluates `num_sequences` sequences of `blend` (the first of its order), `micro_batch_size` at a time.

    decode: gives the images of a batch their pixels; None where there are none.
    """

    blend: Blend
    builder: MicrobatchBuilder
    num_sequences: int
    micro_batch_size: int
    decode: Callable[[Batch], Batch] | None = None

    def run(self, model: list[Any]) -> LossStats:
        """Return losses over all sequences; every rank takes part and gets the result."""
        for chunk in model:
            chunk.eval()
        with torch.no_grad():
            step = self.builder.prepare(self._batches())
            sums = run_schedule(model, step, forward_only=True)
            numbers = StepNumbers.of(join_numbers(sums, step.counts, sums.new_zeros(1)).tolist())
        for chunk in model:
            chunk.train()
        return LossStats.from_sums(numbers.sums, numbers.counts, self.builder.stage)

    def _batches(self) -> list[Batch]:
        """Return this rank's share in microbatches of equal shape; places left over hold padding."""
        mine = range(parallel_state.get_data_parallel_rank(), self.num_sequences, _data_parallel_size())
        return [self._batch(mine[start : start + self.micro_batch_size]) for start in self._starts()]

    def _starts(self) -> range:
        per_rank = -(-self.num_sequences // _data_parallel_size())
        count = -(-per_rank // self.micro_batch_size)
        # The interleaved schedule wants whole rounds of microbatches over the pipeline.
        round_size = parallel_state.get_pipeline_model_parallel_world_size()
        count = -(-count // round_size) * round_size
        return range(0, count * self.micro_batch_size, self.micro_batch_size)

    def _batch(self, indices: range) -> Batch:
        missing = self.micro_batch_size - len(indices)
        batch = self.blend.build_batch([*indices, *[0] * missing])
        batch.document_ids[len(indices) :] = -1
        batch.loss_mask[len(indices) :] = batch.block_padding[len(indices) :] = False
        return batch if self.decode is None else self.decode(batch)


def _data_parallel_size() -> int:
    return parallel_state.get_data_parallel_world_size()

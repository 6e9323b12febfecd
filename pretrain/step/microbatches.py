"""Batches of tokens -> inputs of the model's forwards, with the loss weights of the whole global batch."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from conf.schema import Objective, StageConfig
from data_pipeline.batch import Batch
from data_pipeline.noise import NoiseSource, add_noise
from model.attention.plan import AttentionPlan, PlanBuilder
from model.megatron.head import ScoredRows
from pretrain.objective.local import take_local_rows
from pretrain.objective.rows import (
    ForwardInput,
    RowSelection,
    StepCounts,
    build_ar_input,
    build_joint_input,
    compute_row_weights,
)


@dataclass(frozen=True)
class Microbatch:
    """Input of one forward: rows of this rank. tokens [B, R]; plan, scored: as TriModeModel.forward takes them."""

    tokens: Tensor
    plan: AttentionPlan
    scored: ScoredRows
    selection: RowSelection


@dataclass(frozen=True)
class PreparedStep:
    """This rank's microbatches of a global batch, and the counts of the whole global batch."""

    microbatches: list[Microbatch]
    counts: StepCounts


@dataclass(frozen=True)
class MicrobatchBuilder:
    """Applies the stage's objective, to whole sequences first: noise, scored rows and counts know no context shards.

    noise: of the training or of the held-out split.
    """

    stage: StageConfig
    noise: NoiseSource
    mask_token_id: int
    plans: PlanBuilder

    def prepare(self, batches: Iterable[Batch]) -> PreparedStep:
        """Noise, rows and weights of a step. All data-parallel ranks take part: their counts are summed."""
        inputs = [self._build_input(batch) for batch in batches]
        local = sum((item.counts for item in inputs), start=StepCounts())
        counts = _sum_over_data_parallel(local, self.plans.device)
        return PreparedStep([self._finish(item, counts) for item in inputs], counts)

    def _build_input(self, batch: Batch) -> ForwardInput:
        if self.stage.objective is Objective.ar:
            return build_ar_input(batch)
        return build_joint_input(add_noise(batch, self.noise, self.mask_token_id))

    def _finish(self, item: ForwardInput, counts: StepCounts) -> Microbatch:
        plan = self.plans.build(item.layout)
        tokens, selection = take_local_rows(item, self.plans.shard)
        scored = compute_row_weights(selection, counts, self.stage)
        device = self.plans.device
        return Microbatch(tokens.to(device), plan, scored.to(device), selection)


def _sum_over_data_parallel(counts: StepCounts, device: torch.device) -> StepCounts:
    values = torch.tensor(astuple(counts), dtype=torch.int64, device=device)
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())  # context-parallel ranks count the same
    return StepCounts(*values.tolist())

"""Turn batches of tokens into inputs of the model's forwards, with the loss weights of the whole global batch."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, replace
from itertools import cycle, islice

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from conf.schema import Objective, StageConfig
from data_pipeline.batch import Batch
from data_pipeline.noise import NoiseSource, NoisyBatch, add_noise
from model.attention.live import choose_positions
from model.attention.plan import AttentionPlan, PlanBuilder
from model.megatron.head import ScoredPositions
from model.megatron.image_features import MicrobatchImages
from pretrain.objective.losses import weigh
from pretrain.objective.scoring import StepCounts, count_step, score_ar, score_joint, take_local
from pretrain.step.images import ImageBuilder


@dataclass(frozen=True)
class Microbatch:
    """Input of one forward over this rank's positions, on its device.

    tokens: [B, R]. plan, scored, images: as TriModeModel.forward takes them.
    """

    tokens: Tensor
    plan: AttentionPlan
    scored: ScoredPositions
    images: MicrobatchImages | None = None


@dataclass(frozen=True)
class PreparedStep:
    """This rank's microbatches of a global batch, and the counts of all of it: tensors [] on the device."""

    microbatches: list[Microbatch]
    counts: StepCounts


@dataclass(frozen=True)
class MicrobatchBuilder:
    """Applies the stage's objective, to whole sequences first: noise and scores do not depend on context shards.

    noise: of the training or of the held-out split. noisy_lengths: of a rank's noisy positions, ascending
    (RunConfig.noisy_lengths). images: None for a model of text alone. met_lengths: those that forwards have had so far.
    """

    stage: StageConfig
    noise: NoiseSource
    mask_token_id: int
    plans: PlanBuilder
    noisy_lengths: tuple[int, ...]
    images: ImageBuilder | None = None
    met_lengths: set[int] = field(default_factory=set)

    def prepare(self, batches: Iterable[Batch]) -> PreparedStep:
        """Prepare a step. All data-parallel ranks take part: their counts are summed."""
        is_joint = self.stage.objective is Objective.joint
        noisy = (add_noise(batch, self.noise, self.mask_token_id) if is_joint else batch for batch in batches)
        return self._complete([self._build(batch) for batch in noisy])

    def rehearse(self, batch: Batch, num_microbatches: int) -> PreparedStep:
        """Prepare forwards over a batch without noise, which have all of noisy_lengths in turn."""
        unmasked, certain = torch.zeros_like(batch.loss_mask), torch.ones(batch.tokens.shape)
        noisy, whole = NoisyBatch(batch, batch.tokens, unmasked, certain), self.noisy_lengths[-1]
        lengths = islice(cycle(self.noisy_lengths), num_microbatches)
        builders = [replace(self, noisy_lengths=(length, whole)) for length in lengths]
        return self._complete([builder._build(noisy) for builder in builders])

    def _build(self, given: NoisyBatch | Batch) -> tuple[Microbatch, StepCounts]:
        """Return the microbatch, on the CPU and without weights, and the counts of its whole sequences."""
        shard, is_live = self.plans.shard, None
        if isinstance(given, NoisyBatch):
            batch, noisy = given.batch, given
            tokens, scored, is_live = noisy.doubled_tokens, score_joint(noisy), noisy.is_live
            positions = choose_positions(batch.block_ids, is_live, shard, self.noisy_lengths)
            self.met_lengths.add(positions.noisy.shape[1])
        else:
            batch = given
            tokens, scored = batch.tokens, score_ar(batch)
            positions = shard.find_whole(batch.tokens.shape[1], doubled=False)
        images = self.images.build(batch, tokens, positions) if self.images else None
        tokens, local = take_local(tokens, scored, positions)
        counts = count_step(batch, scored, is_live, tokens.numel() * shard.size)
        counts += self.images.count(batch) if self.images else StepCounts()
        return Microbatch(tokens, self.plans.build_for(batch.layout, positions), local, images), counts

    def _complete(self, built: list[tuple[Microbatch, StepCounts]]) -> PreparedStep:
        """Return the step of all microbatches, given with the counts of each."""
        counts = _sum_over_data_parallel(sum((local for _, local in built), StepCounts()), self.plans.device)
        return PreparedStep([self._finish(microbatch, counts) for microbatch, _ in built], counts)

    def _finish(self, microbatch: Microbatch, counts: StepCounts) -> Microbatch:
        """Move a microbatch to the device, with the weights that follow from the counts of the global batch."""
        device = self.plans.device
        scored = weigh(microbatch.scored.to(device), counts, self.stage)
        images = microbatch.images.to(device) if microbatch.images else None
        return replace(microbatch, tokens=microbatch.tokens.to(device), scored=scored, images=images)


def _sum_over_data_parallel(counts: StepCounts, device: torch.device) -> StepCounts:
    """Return the sums as tensors [] on the device: the host does not wait for them (StepNumbers)."""
    values = torch.tensor(astuple(counts), dtype=torch.int64, device=device)
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())  # context-parallel ranks count the same
    return StepCounts(*values.unbind())  # pyright: ignore[reportArgumentType] (tensors)

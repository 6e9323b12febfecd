"""Balance the work of a step: what sequences cost, and so how the global batch is dealt (data_pipeline/dealing.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

from conf.schema import Objective, RunConfig
from data_pipeline.dataset import Blend
from data_pipeline.dealing import Deal, deal_evenly
from data_pipeline.noise import NoiseSource
from data_pipeline.work import SequenceWork, count_sequence_work
from model.attention.live import choose_length
from pretrain.costs import count_step_flops


@dataclass
class StepBalance:
    """Deals the global batch after any number of samples; every rank computes the same.

    noise: of the training split. num_ranks: data-parallel ones.
    """

    config: RunConfig
    blend: Blend
    noise: NoiseSource
    num_ranks: int
    _cached: Callable[[int], Deal] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._cached = lru_cache(maxsize=self.config.data.prefetch_steps + 2)(self._deal)

    def __call__(self, samples_seen: int) -> Deal:
        """Return the deal of the step after `samples_seen` samples; the latest ones are cached."""
        return self._cached(samples_seen)

    def _deal(self, samples_seen: int) -> Deal:
        train = self.config.train
        work = [self._count(samples_seen + place) for place in range(train.global_batch_size)]
        costs = [compute_microbatch_flops(self.config, [item]) for item in work]
        together = partial(self._compute_flops, work)
        return deal_evenly(costs, train.micro_batch_size, self.num_ranks, together)

    def _compute_flops(self, work: Sequence[SequenceWork], places: list[int]) -> float:
        return compute_microbatch_flops(self.config, [work[place] for place in places])

    def _count(self, sample_index: int) -> SequenceWork:
        form = next(iter(self.blend.sources.values())).form
        noise = self.noise if self.config.stage.objective is Objective.joint else None
        return count_sequence_work(self.blend.outline(sample_index), form, noise, sample_index)


def compute_microbatch_flops(config: RunConfig, work: Sequence[SequenceWork]) -> float:
    """Return the FLOPs that a microbatch of these sequences computes, on all context-parallel ranks together.

    Its longest sequence sets how many noisy positions each one has.
    """
    degree, noisy = config.parallel.context_parallel, 0
    if config.noisy_lengths:
        most = -(-max(item.live_blocks for item in work) // degree) * config.stage.block_size
        noisy = degree * choose_length(most, config.noisy_lengths)
    positions = len(work) * (config.data.sequence_length + noisy)
    attended_pairs = sum(item.attended_pairs for item in work)
    scored = sum(item.scored_positions for item in work)
    return sum(count_step_flops(config.model, positions, attended_pairs, scored))

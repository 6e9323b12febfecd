"""Give each data-parallel rank its microbatches of a step."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread

from data_pipeline.batch import Batch
from data_pipeline.dataset import Blend


@dataclass
class BatchLoader:
    """Build the microbatches of one data-parallel rank, reading ahead.

    Position k of a global batch that starts at global sample f is sample f + k, and is sequence b of microbatch m of
    data-parallel rank r with k = (m * data_parallel_size + r) * micro_batch_size + b. So the set of sequences of a
    step is the same in every layout, and any step is built without the ones before it, whatever their batch size.

    global_batch_size: sequences per optimizer step, over all ranks and microbatches.
    micro_batch_size: sequences of one forward pass of one rank.
    data_parallel_rank, data_parallel_size: this rank's place.
    prefetch_steps: steps read ahead in the background; they change nothing but the time spent waiting.
    num_samples: of the whole run; nothing after them is read ahead. None: there is no end. It may be raised later.
    """

    blend: Blend
    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    prefetch_steps: int = 0
    num_samples: int | None = None
    _ahead: dict[int, Future[list[Batch]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert 0 <= self.data_parallel_rank < self.data_parallel_size
        assert self.global_batch_size % (self.micro_batch_size * self.data_parallel_size) == 0

    @property
    def num_microbatches(self) -> int:
        """Return the number of microbatches of one rank per step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def sample_indices(self, samples_seen: int, microbatch: int) -> range:
        """Return the global sample indices of this rank's microbatch (from 0) of the step after `samples_seen`."""
        place = (microbatch * self.data_parallel_size + self.data_parallel_rank) * self.micro_batch_size
        first = samples_seen + place
        return range(first, first + self.micro_batch_size)

    def microbatches(self, samples_seen: int) -> list[Batch]:
        """Return this rank's microbatches of the step that comes after `samples_seen` sequences, in order."""
        ready = self._ahead.pop(samples_seen, None)
        batches = ready.result() if ready is not None else self._build(samples_seen)
        following = [samples_seen + step * self.global_batch_size for step in range(1, self.prefetch_steps + 1)]
        wanted = [first for first in following if self.num_samples is None or first < self.num_samples]
        self._ahead = {first: self._ahead.get(first) or self._read_ahead(first) for first in wanted}
        return batches

    def _read_ahead(self, samples_seen: int) -> Future[list[Batch]]:
        future: Future[list[Batch]] = Future()

        def fulfil() -> None:
            try:
                future.set_result(self._build(samples_seen))
            except BaseException as error:  # raised where the batches are asked for
                future.set_exception(error)

        # A daemon, unlike an executor's thread: a read that hangs must not keep the process from ending.
        Thread(target=fulfil, name="batch-loader", daemon=True).start()
        return future

    def _build(self, samples_seen: int) -> list[Batch]:
        return [self.blend.build_batch(self.sample_indices(samples_seen, m)) for m in range(self.num_microbatches)]

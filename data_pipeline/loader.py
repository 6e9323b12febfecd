"""Build the microbatches of one data-parallel rank, ahead of the steps that need them."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from data_pipeline.batch import Batch
from data_pipeline.daemons import start_daemon
from data_pipeline.dataset import Blend
from data_pipeline.dealing import Deal, deal_in_order

StepDealer = Callable[[int], Deal]  # from the samples before a step to how its global batch is dealt


@dataclass
class BatchLoader:
    """Builds the microbatches of one data-parallel rank, reading ahead.

    A global batch that starts at global sample f holds the samples from f on, dealt as `dealer` says. So the set of
    sequences of a step is the same in every layout, and any step is built without the ones before it, whatever their
    batch size.

    global_batch_size: sequences per optimizer step, over all ranks and microbatches.
    micro_batch_size: sequences of one forward pass of one rank.
    data_parallel_rank, data_parallel_size: this rank's place.
    prefetch_steps: steps read ahead in the background; they change nothing but the time spent waiting.
    decode: is applied to every microbatch when it is built (images/decode.py); None where there are no images.
    dealer: says how a global batch is dealt; None: as it comes (dealing.py).
    num_samples: of the whole run; nothing after them is read ahead. None: there is no end. It may be raised later.
    """

    blend: Blend
    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    prefetch_steps: int = 0
    num_samples: int | None = None
    decode: Callable[[Batch], Batch] | None = None
    dealer: StepDealer | None = None
    _ahead: dict[int, Future[list[Batch]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert 0 <= self.data_parallel_rank < self.data_parallel_size
        assert self.global_batch_size % (self.micro_batch_size * self.data_parallel_size) == 0

    @property
    def num_microbatches(self) -> int:
        """Return the number of microbatches of one rank per step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def deal(self, samples_seen: int) -> Deal:
        """Return how the step after `samples_seen` samples is dealt."""
        if self.dealer is not None:
            return self.dealer(samples_seen)
        return deal_in_order(self.global_batch_size, self.micro_batch_size, self.data_parallel_size)

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

        start_daemon("batch-loader", fulfil)
        return future

    def _build(self, samples_seen: int) -> list[Batch]:
        mine = self.deal(samples_seen).microbatches[self.data_parallel_rank]
        batches = [self.blend.build_batch([samples_seen + place for place in places]) for places in mine]
        return batches if self.decode is None else [self.decode(batch) for batch in batches]

"""Which sequences a step drafts in: a pure function of the seed and the step, the same under every layout."""

from collections.abc import Sequence

from data_pipeline.order import derive_key, permute
from lora.blocks import DraftBatch, build_draft_batch
from lora.examples import ExampleSet

ORDER, ANCHORS, HELDOUT = range(3)  # what keys are derived for


class DraftBatches:
    """Microbatches of one rank. block_size: of a drafted block, its seed included; blocks: of one sequence."""

    def __init__(
        self, examples: ExampleSet, *, seed: int, blocks: int, block_size: int, micro_batch_size: int, is_heldout: bool
    ) -> None:
        """is_heldout: a fixed order and fixed anchors, whatever the seed, and every sequence counts once."""
        self._examples, self._blocks, self._block_size = examples, blocks, block_size
        self._micro_batch_size = micro_batch_size
        self._is_heldout = is_heldout
        self._order_key = derive_key(HELDOUT if is_heldout else seed, ORDER)
        self._anchor_key = derive_key(HELDOUT if is_heldout else seed, ANCHORS)

    @property
    def num_examples(self) -> int:
        """Sequences of an epoch."""
        return len(self._examples)

    def draw(self, first: int, count: int, rank: int, num_ranks: int) -> list[DraftBatch]:
        """The microbatches of `rank` among the `count` sequences from sample index `first` on.

        count: a multiple of num_ranks * micro_batch_size.
        """
        step = self._micro_batch_size
        assert count % (num_ranks * step) == 0
        mine = range(first + rank * step, first + count, num_ranks * step)
        return [self._build(range(start, start + step)) for start in mine]

    def _build(self, sample_indices: Sequence[int]) -> DraftBatch:
        batch = build_draft_batch(
            [self._examples[self._find(index)] for index in sample_indices],
            sample_indices,
            blocks=self._blocks,
            block_size=self._block_size,
            seed=self._anchor_key,
        )
        if self._is_heldout:  # behind the last sequence nothing counts
            batch.scored[[row for row, index in enumerate(sample_indices) if index >= self.num_examples]] = False
        return batch

    def _find(self, sample_index: int) -> int:
        """The example at a position of the endless order: every epoch a permutation of its own."""
        epoch, place = divmod(sample_index, self.num_examples)
        return permute(place, self.num_examples, derive_key(self._order_key, epoch))

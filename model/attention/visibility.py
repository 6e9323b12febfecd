"""Decide who sees whom: every position of a forward sees one interval of noisy and one interval of clean keys.

Rule (arXiv 2503.09573 and the released training code): a noisy position sees its own noisy block in both directions,
and the clean positions of its document before that block; a clean position sees nothing noisy, and its document up to
itself. Padding and, in the clean half, block padding are seen by no text; what they see themselves is never read.

Masks, attended pairs, FLOPs, context-parallel shards, live blocks, FlexAttention, grouped attention and the drafter's
blocks follow from the intervals; tiled.py cuts the same rule into tiles for one document in regular blocks, and its
tests compare the two.
Shapes: B batch, S clean length, R positions: S (AR) or 2S (joint: the noisy half, then the clean half), n and m
positions and keys of a rectangle of the mask.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipeline.batch import SequenceLayout
from model.attention.positions import ForwardPositions

NO_DOCUMENT = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class VisibleKeys:
    """Holds what each of R positions sees: noisy keys [noisy_start, noisy_stop), clean keys [clean_start, clean_stop).

    All four are int32 [B, R]; noisy and clean keys are each counted from 0. num_noisy, num_clean: how many keys there
    are of each; noisy ones come first, and the first num_noisy positions are noisy as well.
    gaps: [B, S] bool, clean keys within intervals that are seen by none: padding between segments of a document (a
    prompt and its response). None if there is no such key.
    """

    noisy_start: Tensor
    noisy_stop: Tensor
    clean_start: Tensor
    clean_stop: Tensor
    num_noisy: int
    num_clean: int
    gaps: Tensor | None

    def to(self, device: torch.device) -> "VisibleKeys":
        """Return the same intervals on another device."""
        noisy_start, noisy_stop, clean_start, clean_stop = (table.to(device) for table in self.intervals())
        gaps = None if self.gaps is None else self.gaps.to(device)
        return replace(
            self,
            noisy_start=noisy_start,
            noisy_stop=noisy_stop,
            clean_start=clean_start,
            clean_stop=clean_stop,
            gaps=gaps,
        )

    def intervals(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return noisy_start, noisy_stop, clean_start, clean_stop."""
        return self.noisy_start, self.noisy_stop, self.clean_start, self.clean_stop

    def take(self, positions: ForwardPositions) -> "VisibleKeys":
        """Return what a rank's positions see among its own noisy keys and all clean ones, given whole sequences'."""
        noisy_start, noisy_stop, clean_start, clean_stop = (positions.take(table) for table in self.intervals())
        batch_size, num_noisy = len(noisy_start), positions.noisy.shape[1]
        # Noisy blocks are whole, so a noisy key is as far from its place in the sequence as its queries.
        own = torch.arange(num_noisy)
        is_padding, moved = positions.noisy < 0, (positions.noisy - own).int()
        clean_start[:, :num_noisy].masked_fill_(is_padding, 0)
        clean_stop[:, :num_noisy].masked_fill_(is_padding, 0)
        noisy_start[:, :num_noisy] = torch.where(is_padding, own.int(), noisy_start[:, :num_noisy] - moved)
        noisy_stop[:, :num_noisy] = torch.where(is_padding, own.int() + 1, noisy_stop[:, :num_noisy] - moved)
        gaps = None if self.gaps is None else self.gaps.expand(batch_size, -1)
        return VisibleKeys(noisy_start, noisy_stop, clean_start, clean_stop, num_noisy, self.num_clean, gaps)

    def mask_noisy(self, positions: slice, keys: range) -> Tensor:
        """Return [B, n, m] bool: whether each of these positions sees each of these noisy keys."""
        index = torch.arange(keys.start, keys.stop, device=self.noisy_start.device)
        return (index >= self.noisy_start[:, positions, None]) & (index < self.noisy_stop[:, positions, None])

    def mask_clean(self, positions: slice, keys: range) -> Tensor:
        """Return [B, n, m] bool: whether each of these positions sees each of these clean keys."""
        index = torch.arange(keys.start, keys.stop, device=self.clean_start.device)
        seen = (index >= self.clean_start[:, positions, None]) & (index < self.clean_stop[:, positions, None])
        return seen if self.gaps is None else seen & ~self.gaps[:, None, keys.start : keys.stop]

    def count(self) -> Tensor:
        """Return [B, R] int64: how many keys each position sees."""
        counts = (self.noisy_stop - self.noisy_start + self.clean_stop - self.clean_start).long()
        if self.gaps is None:
            return counts
        before = torch.nn.functional.pad(self.gaps.cumsum(dim=1), (1, 0))
        return counts - before.gather(1, self.clean_stop.long()) + before.gather(1, self.clean_start.long())


def find_visible_keys(layout: SequenceLayout, doubled: bool) -> VisibleKeys:
    """Return what every position of a forward sees; doubled: the forward is [noisy | clean] instead of clean alone."""
    index = torch.arange(layout.sequence_length, device=layout.block_ids.device).expand_as(layout.block_ids)
    # Padding belongs here to the document before it; where text of that document follows, it is a gap.
    documents = layout.document_ids.cummax(dim=1).values
    document_start, _ = _find_runs(documents)
    next_document = torch.where(layout.is_text, layout.document_ids, NO_DOCUMENT).flip(1).cummin(dim=1).values.flip(1)
    gaps = ~layout.is_text & (next_document == documents)
    # A softmax needs a key: padding at the end of a document sees itself, a gap the text before it.
    clean_start, clean_stop = torch.where(layout.is_text | gaps, document_start, index), index + 1
    noisy_start = noisy_stop = torch.zeros_like(index)
    if doubled:
        is_padding = layout.document_ids < 0
        block_start, _ = _find_runs(layout.block_ids)
        _, block_stop = _find_runs(2 * layout.block_ids + is_padding)  # padding comes last in its block
        noisy_start = torch.cat([torch.where(is_padding, index, block_start), noisy_start], dim=1)
        noisy_stop = torch.cat([torch.where(is_padding, index + 1, block_stop), noisy_stop], dim=1)
        clean_start = torch.cat([torch.where(is_padding, block_start, document_start), clean_start], dim=1)
        clean_stop = torch.cat([block_start, clean_stop], dim=1)
    return VisibleKeys(
        noisy_start.int(),
        noisy_stop.int(),
        clean_start.int(),
        clean_stop.int(),
        num_noisy=layout.sequence_length if doubled else 0,
        num_clean=layout.sequence_length,
        gaps=gaps if bool(gaps.any()) else None,
    )


def _find_runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return [B, S] the first index and the index after the last of each position's run of equal, ascending ids."""
    ids = ids.contiguous()
    return torch.searchsorted(ids, ids, side="left"), torch.searchsorted(ids, ids, side="right")


def count_visible_keys(layout: SequenceLayout, doubled: bool) -> Tensor:
    """Return [B, R] how many keys each position sees, with 0 for padding: the attended pairs, position by position."""
    is_read = torch.cat([layout.document_ids >= 0, layout.is_text], dim=1) if doubled else layout.is_text
    return torch.where(is_read, find_visible_keys(layout, doubled).count(), 0)


def compute_dense_mask(layout: SequenceLayout, doubled: bool) -> Tensor:
    """Return the whole mask [B, R, R] bool: mask[b, q, k] is True where position q sees position k.

    For references and tests; training never builds it.
    """
    keys = find_visible_keys(layout, doubled)
    clean = keys.mask_clean(slice(None), range(keys.num_clean))
    return torch.cat([keys.mask_noisy(slice(None), range(keys.num_noisy)), clean], dim=2) if doubled else clean


def build_regular_layout(sequence_length: int, block_size: int) -> SequenceLayout:
    """Return one document per sequence in blocks of equal size; fields [1, S]."""
    position_ids = torch.arange(sequence_length)[None]
    no_block_padding = torch.zeros_like(position_ids, dtype=torch.bool)
    return SequenceLayout(torch.zeros_like(position_ids), position_ids // block_size, position_ids, no_block_padding)


def find_regular_block_size(layout: SequenceLayout) -> int | None:
    """Return the block size of a regular layout; None for any other."""
    block_size = int((layout.block_ids[0] == 0).sum())
    if len(layout.position_ids) > 1 or block_size == 0:
        return None
    regular = build_regular_layout(layout.sequence_length, block_size)
    fields = zip(layout.fields(), regular.fields(), strict=True)
    return block_size if all(torch.equal(mine, its) for mine, its in fields) else None

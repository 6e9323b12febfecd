"""Define the one form in which data reaches a trainer, and name every form that it takes on the way to the loss.

    Deal              which sequences each microbatch holds           data_pipeline/dealing.py
    Segments          tokens of one sequence, document by document    data_pipeline/packing/sequence.py
    SequenceLayout    what each token of a batch belongs to           data_pipeline/batch.py
    Batch             B sequences, laid out, and their images         data_pipeline/batch.py
    NoisyBatch        a batch and what is masked in it                data_pipeline/noise.py
    ScoredPositions   positions with a target and a weight            model/megatron/head.py
    AttentionPlan     rotation and attention of the forward           model/attention/plan.py
    Microbatch        input of one forward: tokens and these two      pretrain/step/microbatches.py
    PreparedStep      the microbatches of a global batch              pretrain/step/microbatches.py

Counts of a step are StepCounts (pretrain/objective/scoring.py), its logged losses LossStats (losses.py beside it).
`python -m tests.trace_step` prints which of these a training step builds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """Says which document and block each of S tokens belongs to; fields are [B, S], int64 or bool.

    document_ids: documents numbered from 0 in sequence order; -1 = padding, seen by none.
    block_ids: diffusion blocks numbered from 0 in sequence order; a block never spans two documents, and padding in it
        comes last.
    position_ids: RoPE positions within a half of the forward; they restart at 0 with every document.
    block_padding: True where token s only fills the last block of a document or a response, as decoding meets it:
        noised like the rest of its block, but never AR's target and, being no text, seen by no other block.
    """

    document_ids: Tensor
    block_ids: Tensor
    position_ids: Tensor
    block_padding: Tensor

    @property
    def sequence_length(self) -> int:
        """Return S."""
        return self.position_ids.shape[1]

    @property
    def is_text(self) -> Tensor:
        """Return [B, S] bool: neither padding nor block padding."""
        return (self.document_ids >= 0) & ~self.block_padding

    def fields(self) -> tuple[Tensor, ...]:
        """Return document_ids, block_ids, position_ids, block_padding."""
        return self.document_ids, self.block_ids, self.position_ids, self.block_padding

    def to(self, device: torch.device | str) -> "SequenceLayout":
        """Return the same layout on another device."""
        return SequenceLayout(*(field.to(device) for field in self.fields()))

    def without_repeats(self) -> "SequenceLayout":
        """Return the same layout with B = 1 if all sequences of the batch are laid out alike."""
        if any(not torch.equal(field, field[:1].expand_as(field)) for field in self.fields()):
            return self
        return SequenceLayout(*(field[:1] for field in self.fields()))


class ImageFile(Protocol):
    """Names a stored picture; small, and pickled by name."""

    def read(self) -> bytes:
        """Return the file of the picture as it was given. Raises: UserError if it is not what was stored."""
        ...


@dataclass(frozen=True)
class PlacedImage:
    """Says where an image is in a batch.

    sequence: of the batch, 0..B-1. first: position of its <|image_start|> in the sequence; its tokens follow.
    grid: features (height h, width w), so that it has 1 + h (w + 1) tokens. stored: its file.
    pixels: [3, 28 h, 28 w] fp32, once it is decoded.
    """

    sequence: int
    first: int
    grid: tuple[int, int]
    stored: ImageFile
    pixels: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Holds B packed sequences of S clean tokens; all tensors are on one device.

    tokens: [B, S] int64 token ids.
    layout: what each token belongs to; its fields can be read from the batch as well.
    loss_mask: [B, S] bool; True where token s may be scored (in token space: the position that predicts it comes
        before it).
    sample_indices: [B] int64 global sample index of each sequence; seeds its noise.
    images: of its prompts, in the order of their tokens.
    """

    tokens: Tensor
    layout: SequenceLayout
    loss_mask: Tensor
    sample_indices: Tensor
    images: tuple[PlacedImage, ...] = ()

    @property
    def document_ids(self) -> Tensor:
        """Return the layout's document_ids [B, S]."""
        return self.layout.document_ids

    @property
    def block_ids(self) -> Tensor:
        """Return the layout's block_ids [B, S]."""
        return self.layout.block_ids

    @property
    def position_ids(self) -> Tensor:
        """Return the layout's position_ids [B, S]."""
        return self.layout.position_ids

    @property
    def block_padding(self) -> Tensor:
        """Return the layout's block_padding [B, S]."""
        return self.layout.block_padding

    def tensors(self) -> tuple[Tensor, ...]:
        """Return tokens, the layout's fields, loss_mask and sample_indices."""
        return self.tokens, *self.layout.fields(), self.loss_mask, self.sample_indices

    def to(self, device: torch.device | str) -> "Batch":
        """Return the same batch on another device."""
        return _from_tensors((tensor.to(device) for tensor in self.tensors()), _move(self.images, device))


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Return one batch with the sequences of several, in order."""
    fields = zip(*(batch.tensors() for batch in batches), strict=True)
    images: list[PlacedImage] = []
    num_before = 0
    for batch in batches:
        images += (replace(image, sequence=num_before + image.sequence) for image in batch.images)
        num_before += len(batch.tokens)
    return _from_tensors((torch.cat(field) for field in fields), tuple(images))


def _from_tensors(tensors: Iterable[Tensor], images: tuple[PlacedImage, ...]) -> Batch:
    tokens, *layout, loss_mask, sample_indices = tensors
    return Batch(tokens, SequenceLayout(*layout), loss_mask, sample_indices, images)


def _move(images: tuple[PlacedImage, ...], device: torch.device | str) -> tuple[PlacedImage, ...]:
    return tuple(image if image.pixels is None else replace(image, pixels=image.pixels.to(device)) for image in images)

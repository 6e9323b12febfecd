"""The one shape in which data reaches the trainer, in every stage."""

from dataclasses import dataclass, fields

import torch


@dataclass
class Batch:
    """B packed sequences of S clean tokens. All index tensors are int64, on one device.

    tokens: [B, S] token ids.
    document_ids: [B, S] documents numbered from 0 within a sequence; -1 = padding, seen by none.
    block_ids: [B, S] diffusion blocks numbered from 0 in sequence order; a block never spans two documents.
    position_ids: [B, S] in-half RoPE positions; they restart at 0 with every document.
    loss_mask: [B, S] bool; True where token s may be scored (token space: the row that predicts it comes before it).
    block_padding: [B, S] bool; True where token s only completes the last block of a document or an answer, as decoding
        meets it: noised like the rest of its block, but never AR's target and, being no text, seen by no other block.
    sample_indices: [B] global sample index of each sequence; seeds its noise.
    """

    tokens: torch.Tensor
    document_ids: torch.Tensor
    block_ids: torch.Tensor
    position_ids: torch.Tensor
    loss_mask: torch.Tensor
    block_padding: torch.Tensor
    sample_indices: torch.Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

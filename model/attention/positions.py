"""Name the positions of a forward on a rank: which of [noisy | clean] it computes, in which order.

Shapes: B batch, S clean length, N noisy and C clean positions of this rank, R = N + C.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ForwardPositions:
    """Holds the places in the sequence of a rank's noisy and clean positions, in the order of the forward.

    noisy: [B, N] int64; whole noisy blocks, ascending, then padding (-1) that is read by none. B is 1 where they are
        the same in every sequence; N is 0 without noise (AR).
    clean: [C] int64, ascending, the same in every sequence.
    sequence_length: S.
    """

    noisy: Tensor
    clean: Tensor
    sequence_length: int

    @property
    def has_noisy(self) -> bool:
        """Whether there are noisy positions (joint) or only clean ones (AR)."""
        return self.noisy.shape[1] > 0

    @property
    def is_whole(self) -> bool:
        """Whether no noisy position is left out, or there are none: a rank has the same chunks of both halves."""
        return not self.has_noisy or (len(self.noisy) == 1 and torch.equal(self.noisy[0], self.clean))

    def find_in_whole(self) -> Tensor:
        """Return [B, R] the place of each position in the whole forward, [noisy | clean] or clean; -1: padding."""
        offset = self.sequence_length if self.has_noisy else 0
        return torch.cat([self.noisy, (self.clean + offset).expand(len(self.noisy), -1)], dim=1)

    def take(self, values: Tensor) -> Tensor:
        """Map values [B or 1, 2S] or, without noise, [B or 1, S] of whole sequences to [B, R].

        Padding gets the first position's. B is 1 if both are the same in every sequence.
        """
        places = self.find_in_whole().clamp(min=0)
        batch_size = max(len(values), len(places))
        return values.expand(batch_size, -1).gather(1, places.expand(batch_size, -1))

    def without_repeats(self) -> "ForwardPositions":
        """Return the same positions with B = 1 if they are the same in every sequence."""
        if not torch.equal(self.noisy, self.noisy[:1].expand_as(self.noisy)):
            return self
        return ForwardPositions(self.noisy[:1], self.clean, self.sequence_length)

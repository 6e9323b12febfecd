r"""Put features in the place of image tokens, each image's computed by one rank and gathered by all.

Every tensor- and context-parallel rank of the first pipeline stage computes the features of some images
(pretrain/step/images.py deals them) and gathers those of all. A rank puts features where it holds image tokens; going
back, it gets the sum of their gradients over all ranks that used them.

    rank 0   image A        features A \              hidden  t t A A t | A A
    rank 1   images B, C    features B C  > A B C >   hidden  t B B t C | C t     with context parallelism
Shapes: B batch, R positions of this rank, F features of all images, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from model.megatron.vision import VisionEncoder


@dataclass(frozen=True)
class MicrobatchImages:
    """Holds a rank's images of a microbatch, and says where the features of all of them go.

    pixels: [3, height, width] of each image of this rank. counts: features of each rank, in the order of gathering.
    positions: [N] int64 index into this rank's flattened [R, B] positions (r * B + b), ascending. features: [N] int64
    gathered feature that each gets.
    """

    pixels: tuple[Tensor, ...]
    counts: tuple[int, ...]
    positions: Tensor
    features: Tensor

    def to(self, device: torch.device) -> "MicrobatchImages":
        """Return the same on another device."""
        pixels = tuple(image.to(device, non_blocking=True) for image in self.pixels)
        return MicrobatchImages(pixels, self.counts, self.positions.to(device), self.features.to(device))


def image_group() -> Any:
    """Return the ranks over which the images of a microbatch are spread."""
    return parallel_state.get_tensor_and_context_parallel_group()


def insert_features(hidden: Tensor, images: MicrobatchImages, encoder: VisionEncoder) -> Tensor:
    """Return embeddings hidden [R, B, H] with the images' features in their places."""
    trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in encoder.parameters())
    if not trains and not sum(images.counts):
        return hidden
    features = encoder(images.pixels)
    if trains and not features:
        # Gradient reduction waits for every weight of a rank: one without images takes part with nothing of a blank.
        blank = hidden.new_zeros(3, encoder.vision.pixels_per_feature, encoder.vision.pixels_per_feature)
        features = [encoder([blank])[0][:0]]
    own = torch.cat(features).to(hidden.dtype) if features else hidden.new_empty(0, hidden.shape[2])
    gathered = _Gather.apply(own, images.counts, encoder.config.sequence_parallel)
    flat = hidden.flatten(0, 1).index_copy(0, images.positions, gathered[images.features])
    return flat.view_as(hidden)


class _Gather(torch.autograd.Function):
    """Gathers features over image_group(); going back, sums their gradients where ranks used different ones."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: Sequence[int], sequence_parallel: bool) -> Tensor:
        """Map this rank's features to those of all ranks [F, H]; counts: of each rank."""
        group = image_group()
        ctx.counts, ctx.rank = counts, group.rank()
        # Without sequence parallelism, tensor-parallel ranks hold the same positions and the same, whole gradients.
        ctx.group = group if sequence_parallel else parallel_state.get_context_parallel_group()
        if group.size() == 1 or not sum(counts):
            return own
        padded = own.new_zeros(max(counts), own.shape[1])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of this rank's features."""
        if ctx.group.size() > 1 and len(grad):
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.group)
        return grad.split(list(ctx.counts))[ctx.rank], None, None

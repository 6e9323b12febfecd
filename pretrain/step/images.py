"""Deal the images of a microbatch to ranks, and find where the features of each go.

Which rank takes which image follows from their sizes, and where features go from the tokens: every rank knows both
without asking. Ranks decode their own images alone (data_pipeline/images/decode.py).
Shapes: B batch, S clean length, R positions of this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from conf.schema import VisionConfig
from conf.system.errors import UserError
from data_pipeline.batch import Batch, PlacedImage
from model.attention.positions import ForwardPositions
from model.hf.image_tokens import IMAGE_PAD, Grid
from model.megatron.image_features import MicrobatchImages, image_group
from pretrain.objective.scoring import StepCounts


@dataclass(frozen=True)
class ImageBuilder:
    """Builds what the first pipeline stage needs of the images of a microbatch; other stages need nothing.

    sequence_parallel: whether the residual stream is split by positions over the tensor-parallel ranks.
    """

    vision: VisionConfig
    sequence_parallel: bool

    def choose(self, images: Sequence[PlacedImage]) -> list[int]:
        """Return the numbers of the images of a microbatch that this rank computes."""
        if not parallel_state.is_pipeline_first_stage():
            return []
        group = image_group()
        ranks = deal_images([image.grid for image in images], group.size(), self.vision)
        return [number for number, rank in enumerate(ranks) if rank == group.rank()]

    def build(self, batch: Batch, tokens: Tensor, positions: ForwardPositions) -> MicrobatchImages | None:
        """Return the images of `batch`, whose images of this rank are decoded.

        tokens: [B, S], or [B, 2S] as [noisy | clean]. positions: of this rank.
        """
        if not parallel_state.is_pipeline_first_stage():
            return None
        grids = [image.grid for image in batch.images]
        ranks = deal_images(grids, image_group().size(), self.vision)
        features = self._take_local(positions.take(find_features(tokens, batch.tokens, ranks, grids)).t()).flatten()
        places = torch.nonzero(features >= 0)[:, 0]
        pixels = [batch.images[number].pixels for number in self.choose(batch.images)]
        assert all(image is not None for image in pixels), "the loader decodes this rank's images"
        counts = [0] * image_group().size()
        for rank, (height, width) in zip(ranks, grids, strict=True):
            counts[rank] += height * width
        decoded = tuple(image for image in pixels if image is not None)
        return MicrobatchImages(decoded, tuple(counts), places, features[places])

    def count(self, batch: Batch) -> StepCounts:
        """Count the images of a batch."""
        patches = [height * width * self.vision.merge_size**2 for height, width in (i.grid for i in batch.images)]
        return StepCounts(
            images=len(patches), patches=sum(patches), attended_patches=sum(number * number for number in patches)
        )

    def _take_local(self, values: Tensor) -> Tensor:
        """Map [R, B] to those of this rank's part of the residual stream."""
        if not self.sequence_parallel:
            return values
        parts = values.chunk(parallel_state.get_tensor_model_parallel_world_size())
        return parts[parallel_state.get_tensor_model_parallel_rank()]


def deal_images(grids: Sequence[Grid], num_ranks: int, vision: VisionConfig) -> list[int]:
    """Return the rank that computes each image of a microbatch: the largest first, each to the rank with least work."""
    work = [0] * num_ranks
    ranks = [0] * len(grids)
    costs = [_estimate_cost(grid, vision) for grid in grids]
    for image in sorted(range(len(grids)), key=lambda image: -costs[image]):
        ranks[image] = min(range(num_ranks), key=lambda rank: work[rank])
        work[ranks[image]] += costs[image]
    return ranks


def _estimate_cost(grid: Grid, vision: VisionConfig) -> int:
    """Return FLOPs of a layer of the tower on an image, up to a factor."""
    patches = grid[0] * grid[1] * vision.merge_size**2
    matmuls = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.ffn_hidden_size
    return patches * (matmuls + 2 * patches * vision.hidden_size)


def find_features(tokens: Tensor, clean_tokens: Tensor, ranks: Sequence[int], grids: Sequence[Grid]) -> Tensor:
    """Return which gathered feature takes the place of each token, like `tokens`; -1: none.

    Args:
        tokens: [B, S], or [B, 2S] as [noisy | clean].
        clean_tokens: [B, S], in which the images' tokens follow each other in the order of the images.
        ranks: of deal_images.
        grids: features of each image.

    Raises:
        UserError: not one image token for each feature.
    """
    counts = [height * width for height, width in grids]
    sizes = torch.tensor(counts, dtype=torch.int64)
    gathered = torch.argsort(torch.tensor(ranks, dtype=torch.int64), stable=True)  # images, rank by rank
    starts = torch.zeros_like(sizes)
    starts[gathered] = sizes[gathered].cumsum(0) - sizes[gathered]
    numbers = torch.cat([start + torch.arange(size) for start, size in zip(starts, counts, strict=True)] or [sizes])
    is_feature = clean_tokens == IMAGE_PAD
    if int(is_feature.sum()) != len(numbers):
        raise UserError(
            f"a microbatch has {int(is_feature.sum())} image tokens (id {IMAGE_PAD}) for {len(numbers)} features of "
            f"{len(grids)} images: train a model that reads images on data prepared with data=images"
        )
    places = torch.full_like(clean_tokens, -1).masked_scatter(is_feature, numbers)
    places = places.repeat(1, tokens.shape[1] // clean_tokens.shape[1])
    return torch.where(tokens == IMAGE_PAD, places, -1)

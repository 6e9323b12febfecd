"""Draw fresh weights that do not depend on the layout: each tensor follows from its name and the seed."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conf.schema import ModelConfig
from model.megatron.shards import copy_local_slice, iterate_local_shards

# Projections back into the residual stream start smaller, by 1 / sqrt(2 * layers) (GPT-2, Megatron-LM).
RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def initialise_weights(chunks: Sequence[nn.Module], model: ModelConfig, seed: int) -> None:
    """Set weights to normal draws with model.init_std, those of norms to ones."""
    for shard in iterate_local_shards(chunks):
        copy_local_slice(shard, _draw(shard.key, tuple(shard.global_shape), model, seed))


def _draw(key: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    scale = 1 / math.sqrt(2 * model.num_layers) if key.endswith(RESIDUAL_PROJECTIONS) else 1.0
    return torch.randn(shape, generator=generator) * (model.init_std * scale)

"""Weights from a Hugging Face directory or a step directory into a live model, in whatever layout it is.

Call on every rank, before the optimizer takes its fp32 copies of the weights (or tell it to reload them).
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import nn

from conf.schema import ModelConfig
from conf.system.errors import UserError
from model.checkpoint.layout import check_same_model, load_manifest, model_config_from
from model.convert.dist_reader import DistReader
from model.convert.hf_source import HfSource
from model.convert.mapping import build_table
from model.megatron.shards import copy_local_slice, iterate_local_shards


def load_hf_weights(chunks: Sequence[nn.Module], source_dir: Path | str, model: ModelConfig) -> None:
    """Fill the chunks of this rank from a Ministral 3 or tri-mode directory, one global tensor at a time.

    model: what `chunks` were built from. Weights keep the live model's dtype and device.
    Raises: UserError if the directory is damaged or holds another model.
    """
    with HfSource(source_dir) as source:
        check_same_model(source.config.model, model, str(source_dir))
        entries = {entry.megatron: entry for entry in source.table}
        # The gate and the up half of a fused tensor are two shards: read it once for both.
        for key, shards in groupby(iterate_local_shards(chunks), key=lambda shard: shard.key):
            if key not in entries:
                raise UserError(f"the model has a weight {key} that {source_dir} cannot fill: another layer kind?")
            full = source.read(entries[key])
            for shard in shards:
                copy_local_slice(shard, full)
            del full  # before the next one is read


def load_megatron_weights(chunks: Sequence[nn.Module], step_dir: Path | str, model: ModelConfig) -> None:
    """Fill the chunks of this rank from a step directory written under any layout; optimizer state is not touched.

    model: what `chunks` were built from. Weights keep the live model's dtype and device.
    Raises: UserError if the checkpoint is incomplete or holds another model.
    """
    stored = model_config_from(load_manifest(step_dir).model, str(step_dir))
    check_same_model(stored, model, str(step_dir))
    DistReader(step_dir).check(build_table(model))
    # megatron-core fills the shards' data, which are views of the live weights.
    state: dict[str, Any] = {str(i): shard for i, shard in enumerate(iterate_local_shards(chunks))}
    dist_checkpointing.load(state, str(step_dir), TorchDistLoadShardedStrategy())

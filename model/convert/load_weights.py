"""Loads weights from a Hugging Face directory or a step directory into a live model of any layout.

Call these on every rank before the optimizer takes its fp32 copies of the weights, or make it reload them.
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
from model.checkpoint.layout import check_same_model, load_checkpoint_manifest, model_config_from
from model.convert.dist_reader import DistReader
from model.convert.hf_source import HfSource
from model.convert.mapping import build_tensor_table
from model.megatron.shards import copy_local_slice, iterate_local_shards


def load_hf_weights(chunks: Sequence[nn.Module], source_dir: Path | str, model: ModelConfig) -> None:
    """Fill this rank's model chunks from a Ministral 3 or tri-mode directory, one global tensor at a time.

    Args:
        chunks: the live model; its dtype and device do not change.
        source_dir: the Hugging Face directory.
        model: the configuration that `chunks` were built from.

    Raises:
        UserError: the directory is damaged or holds another model.
    """
    with HfSource(source_dir) as source:
        check_same_model(source.config.model, model, str(source_dir))
        entries = {entry.megatron: entry for entry in source.table}
        # The gate half and the up half of a fused tensor are two shards; one read serves both.
        for key, shards in groupby(iterate_local_shards(chunks), key=lambda shard: shard.key):
            if key not in entries:
                raise UserError(
                    f"the model has a weight {key} that {source_dir} does not have: was it built with other layers?"
                )
            full = source.read(entries[key])
            for shard in shards:
                copy_local_slice(shard, full)
            del full  # before the next one is read


def load_megatron_weights(chunks: Sequence[nn.Module], step_dir: Path | str, model: ModelConfig) -> None:
    """Fill this rank's model chunks from a step directory of any layout; optimizer state is not touched.

    Args:
        chunks: the live model; its dtype and device do not change.
        step_dir: the step directory.
        model: the configuration that `chunks` were built from.

    Raises:
        UserError: the checkpoint is incomplete or holds another model.
    """
    stored = model_config_from(load_checkpoint_manifest(step_dir).model, str(step_dir))
    check_same_model(stored, model, str(step_dir))
    DistReader(step_dir).check(build_tensor_table(model))
    # megatron-core fills the shards' data, which are views of the live weights.
    state: dict[str, Any] = {str(i): shard for i, shard in enumerate(iterate_local_shards(chunks))}
    dist_checkpointing.load(state, str(step_dir), TorchDistLoadShardedStrategy())

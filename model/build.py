"""RunConfig -> the model chunks of this rank."""

import logging
from collections.abc import Sequence

from megatron.core import parallel_state
from torch import nn

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from model.spec import build_block_spec, choose_gradient_accumulation_fusion, choose_transformer_engine
from model.transformer_config import TORCH_DTYPES, build_transformer_config
from model.tri_mode import TriModeModel

logger = logging.getLogger(__name__)


def build_model_chunks(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, loss_chunk_rows: int
) -> list[TriModeModel]:
    """One TriModeModel per virtual pipeline stage of this rank (one without interleaving).

    Weights are not set yet: model/initialise.py or model/convert/load_weights.py fill them. megatron-core's process
    groups must exist (pretrain/distributed.py).
    """
    _log_choices()
    config = build_transformer_config(model, parallel, precision)
    stages: list[int | None] = [None]
    if parallel.virtual_pipeline_parallel > 1:
        stages = list(range(parallel.virtual_pipeline_parallel))
    chunks = []
    for vp_stage in stages:
        chunk = TriModeModel(
            config,
            model,
            build_block_spec(config, vp_stage),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            loss_chunk_rows=loss_chunk_rows,
            vp_stage=vp_stage,
        )
        chunks.append(chunk.to(TORCH_DTYPES[precision.dtype]))
    return chunks


def _log_choices() -> None:
    use_transformer_engine, reason = choose_transformer_engine()
    logger.info("layers: %s (%s)", "Transformer Engine" if use_transformer_engine else "megatron-core", reason)
    fused, reason = choose_gradient_accumulation_fusion()
    logger.info("gradient_accumulation_fusion: %s (%s)", "on" if fused else "off", reason)


def count_parameters(chunks: Sequence[nn.Module]) -> int:
    """Parameters held by this rank."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())

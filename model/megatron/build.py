"""Build the model chunks of this rank from the configuration."""

import logging
from collections.abc import Sequence

from megatron.core import parallel_state
from torch import nn

from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig, VisionPrecision
from model.megatron.kernel_choice import check_machine, list_choices
from model.megatron.spec import build_block_spec
from model.megatron.transformer_config import TORCH_DTYPES, build_transformer_config
from model.megatron.tri_mode import TriModeModel
from model.megatron.vision import VISION_DTYPES, allow_rounded_matmuls

logger = logging.getLogger(__name__)


def build_model_chunks(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, loss_chunk_rows: int
) -> list[TriModeModel]:
    """Build one TriModeModel per virtual pipeline stage of this rank (one without interleaving).

    Weights are not set yet: model/megatron/initialise.py or model/convert/load_weights.py fill them. megatron-core's
    process groups must exist (pretrain/run/model_parallel.py).

    Raises:
        UserError: This machine lacks what the configuration asks for.
    """
    check_machine(parallel, precision)
    for choice in list_choices(parallel.recompute):
        logger.info("%s", choice)
    if precision.fp8 is not None:
        logger.info("matmuls of layers: fp8, %s; head and weights: %s", precision.fp8.value, precision.dtype.value)
    if model.vision is not None:
        logger.info("vision tower and projector compute in %s", precision.vision.value)
        allow_rounded_matmuls(precision.vision is VisionPrecision.tf32)
    config = build_transformer_config(model, parallel, precision)
    stages: list[int | None] = [None]
    if parallel.virtual_pipeline_parallel > 1:
        stages = list(range(parallel.virtual_pipeline_parallel))
    chunks = []
    for vp_stage in stages:
        chunk = TriModeModel(
            config,
            model,
            build_block_spec(config, vp_stage, parallel.recompute),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            loss_chunk_rows=loss_chunk_rows,
            vision_dtype=VISION_DTYPES[precision.vision],
            vp_stage=vp_stage,
        )
        chunks.append(chunk.to(TORCH_DTYPES[precision.dtype]))
    return chunks


def count_parameters(chunks: Sequence[nn.Module]) -> int:
    """Return the number of parameters that this rank holds."""
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())

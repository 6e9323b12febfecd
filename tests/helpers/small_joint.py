"""A small model in one process, and a joint forward of it, for tests that compare two ways to compute the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from conf.schema import (
    AttentionBackend,
    Device,
    Dtype,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    Recompute,
    RuntimeConfig,
)
from model.attention.plan import AttentionPlan, PlanBuilder
from model.attention.visibility import build_regular_layout
from model.megatron.build import build_model_chunks
from model.megatron.initialise import initialise_weights
from model.megatron.transformer_config import TORCH_DTYPES
from pretrain.run.model_parallel import distributed_session

MODEL = ModelConfig("toy", 2, 32, 48, 4, 2, 16, 128)
BATCH, LENGTH, BLOCK_SIZE = 2, 32, 8
NUM_POSITIONS = BATCH * 2 * LENGTH


@contextmanager
def built_model(recompute: Recompute, dtype: Dtype = Dtype.fp32) -> Iterator[tuple[Any, AttentionPlan]]:
    """Yield the model, its weights always the same, and the plan of a joint forward of LENGTH tokens."""
    parallel = ParallelConfig(recompute=recompute)
    with distributed_session(parallel, RuntimeConfig(device=Device.cpu), seed=0):
        (chunk,) = build_model_chunks(MODEL, parallel, PrecisionConfig(dtype), loss_chunk_rows=16)
        initialise_weights([chunk], MODEL, seed=0)
        plans = PlanBuilder(MODEL, AttentionBackend.cpu, TORCH_DTYPES[dtype], torch.device("cpu"))
        yield chunk, plans.build(build_regular_layout(LENGTH, BLOCK_SIZE), doubled=True)

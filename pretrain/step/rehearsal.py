"""Compute every length of the noisy half once before training, so that no step waits for a kernel.

Kernels are compiled for each length, and the noise draws which one a microbatch has: the short ones come up once in
thousands, on some rank or other, and all others would wait for it. What is computed here is dropped.
"""

import logging
import time
from typing import Any

from megatron.core import parallel_state

from data_pipeline.batch import Batch
from pretrain.step.microbatches import MicrobatchBuilder
from pretrain.step.schedule import run_schedule

logger = logging.getLogger(__name__)


def rehearse(model: list[Any], builder: MicrobatchBuilder, batch: Batch) -> None:
    """Run forward and backward at every noisy length, laid out as the batch is; all ranks take part.

    Changes nothing but the gradient buffers, which every step clears.
    """
    started, stages = time.perf_counter(), parallel_state.get_pipeline_model_parallel_world_size()
    num_microbatches = -(-len(builder.noisy_lengths) // stages) * stages  # interleaved schedules take multiples
    for chunk in model:
        chunk.zero_grad_buffer()
    run_schedule(model, builder.rehearse(batch, num_microbatches), forward_only=False)
    seconds = time.perf_counter() - started
    logger.info("forwards with %d noisy lengths rehearsed in %.1f s", len(builder.noisy_lengths), seconds)

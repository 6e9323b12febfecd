"""Sets up Transformer Engine's buffers ("userbuffers"), through which collectives overlap with a layer's matmuls.

megatron-core's layers use them where configured (tp_comm_overlap), but the trainer must create them: all processes
together, after the process groups and before the first forward. A buffer holds the positions of one forward of all
ranks of a tensor-parallel group; every forward of a run has as many.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conf.schema import RunConfig
from conf.system.errors import UserError
from model.megatron.kernel_choice import check_machine
from model.megatron.transformer_config import TORCH_DTYPES

logger = logging.getLogger(__name__)
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@contextmanager
def userbuffers(config: RunConfig) -> Iterator[None]:
    """Hold the buffers while the block runs, if parallel.overlap_tensor_parallel asks for them. Raises: UserError."""
    if not config.parallel.overlap_tensor_parallel:
        yield
        return
    check_machine(config.parallel, config.precision)
    import transformer_engine.pytorch as engine  # type: ignore[import-not-found]

    _start(engine, config)
    yield
    engine.destroy_ub()  # not after an error: the process ends then, and peers may still be inside a collective


def _start(engine: Any, config: RunConfig) -> None:
    modes = engine.UserBufferQuantizationMode
    positions, hidden = config.positions_per_forward, config.model.hidden_size
    try:
        engine.initialize_ub(
            shape=[positions, hidden],
            tp_size=config.parallel.tensor_parallel,
            quantization_modes=[modes.NONE if config.precision.fp8 is None else modes.FP8],
            dtype=TORCH_DTYPES[config.precision.dtype],
            bootstrap_backend="nccl",
        )
    except RuntimeError as error:
        raise UserError(
            f"parallel.overlap_tensor_parallel=true: Transformer Engine cannot set up its buffers: {error}. Its ranks "
            "must share a node's NVLink; without multicast try UB_SKIPMC=1, or parallel.overlap_tensor_parallel=false."
        ) from error
    logger.info("tensor-parallel collectives overlap with matmuls: buffers of %d x %d", positions, hidden)
    if os.environ.get(CONNECTIONS) != "1":
        logger.warning(
            "%s=1 lets a GPU before Blackwell start collectives ahead of matmuls; it is not set", CONNECTIONS
        )

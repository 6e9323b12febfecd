"""Tell megatron-core's pipeline the shape of everything it receives, without asking the pipeline stage that sends it.

Microbatches differ in length (model/attention/live.py). megatron-core's own way, variable_seq_lengths, sends the shape
of every tensor ahead of it and makes the host wait for the device twice per message. But every pipeline stage prepares
the same microbatches, so it knows their lengths; all that is needed is which microbatch comes next.

Hidden states of a chunk come from the pipeline stage before in the order in which it computes them, the gradients from
the one after in the order of its backward. Both are those of megatron-core's schedule table.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

Shape = tuple[int, ...]
DATA_GROUPS = ("dp", "dp_cp", "tp_dp_cp")


def build_pipeline_options(model: Sequence[Any], microbatches: Sequence[Tensor]) -> dict[str, Any]:
    """Return what megatron-core's pipelined schedules take in addition; nothing without a pipeline.

    model: this rank's chunks. microbatches: tokens [B, R] of each, of this rank's positions.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return {}
    config = get_model_config(model[0])
    ranks = parallel_state.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
    shapes = [(tokens.shape[1] // ranks, len(tokens), config.hidden_size) for tokens in microbatches]
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "embd", "pos_embd", "pp", *DATA_GROUPS])
    return {"p2p_communicator": KnownShapes(config, len(model), shapes), "pg_collection": groups}


class KnownShapes(P2PCommunicator):
    """megatron-core's communicator for one step, given the shape of each microbatch's hidden states on this rank."""

    def __init__(self, config: Any, num_chunks: int, shapes: Sequence[Shape]) -> None:
        config = copy(config)
        config.variable_seq_lengths = True  # so that it asks for every shape
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        super().__init__(group, config)
        table = get_schedule_table(len(shapes), num_chunks, config.microbatch_group_size_per_vp_stage)
        self._hidden = _list_received(table, shapes, num_chunks, has_own=self.is_pp_first_stage)
        self._gradients = _list_received(table, shapes, num_chunks, has_own=self.is_pp_last_stage)

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape, Shape]:
        """Return the shapes of the next hidden states and gradients, as far as they are received."""
        none = (0, 0, 0)
        return next(self._hidden) if recv_prev else none, next(self._gradients) if recv_next else none


def _list_received(
    table: Sequence[tuple[int, int]], shapes: Sequence[Shape], num_chunks: int, has_own: bool
) -> Iterator[Shape]:
    """Yield what this rank receives in one direction, in order; has_own: for one of its chunks it makes its own.

    table: (microbatch, chunk) in the order of computation. Which chunk it is does not matter: all see the same order.
    """
    return iter([shapes[microbatch] for microbatch, chunk in table if chunk < num_chunks - has_own])

"""Layout of a model over ranks. The data-parallel degree is what the world size leaves.

Optimizer state is always sharded over the data-parallel ranks: one format of checkpoints for every layout.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Optional


class Recompute(Enum):
    """Activations that the backward pass recomputes.

    none: nothing. elementwise: outputs of norms and of SwiGLU. selective: attention. full: every layer.
    """

    none = "none"
    elementwise = "elementwise"
    selective = "selective"
    full = "full"


@dataclass
class ParallelConfig:
    """Degrees and switches of the parallel layout.

    tensor_parallel: ranks over which every layer is split. pipeline_parallel: ranks over which layers are distributed.
    context_parallel: ranks over which the positions of every sequence are split, in the joint stage both halves alike.
    virtual_pipeline_parallel: model chunks per pipeline rank (interleaved schedule when > 1).
    sequence_parallel: split norms and residual stream along the sequence over the tensor-parallel ranks.
    overlap_grad_reduce, overlap_param_gather: overlap data-parallel communication with compute.
    bucket_parameters: parameters reduced or gathered together when overlapping; null is megatron-core's default.
    overlap_tensor_parallel: overlap the collectives within layers with their matmuls (Transformer Engine's
    userbuffers); needs sequence_parallel.
    overlap_pipeline: overlap sends between pipeline stages with compute; needs the interleaved schedule.
    recompute: see Recompute.
    offload_layers: layers, from the first, whose activations wait in host memory for the backward pass (Transformer
    Engine); fewer than the model has.
    """

    tensor_parallel: int = 1
    context_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline_parallel: int = 1
    sequence_parallel: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_parameters: Optional[int] = None
    overlap_tensor_parallel: bool = False
    overlap_pipeline: bool = False
    recompute: Recompute = Recompute.none
    offload_layers: int = 0

    @property
    def model_parallel(self) -> int:
        """Ranks that train on the same sequences together."""
        return self.tensor_parallel * self.context_parallel * self.pipeline_parallel

    def describe(self, world_size: int) -> str:
        """Return the layout on `world_size` ranks in the usual short form, such as TP2 PP2 DP1."""
        parts = [f"TP{self.tensor_parallel}"]
        if self.context_parallel > 1:
            parts.append(f"CP{self.context_parallel}")
        parts.append(f"PP{self.pipeline_parallel}")
        if self.virtual_pipeline_parallel > 1:
            parts.append(f"VPP{self.virtual_pipeline_parallel}")
        parts.append(f"DP{world_size // self.model_parallel}")
        if self.sequence_parallel:
            parts.append("SP")
        return " ".join(parts)

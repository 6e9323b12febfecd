"""Describe the GPUs and networks that times are predicted for; every number is an option of the command."""

from dataclasses import dataclass

from pretrain.costs import PEAK_FLOPS_BF16

GIGA = 1e9


@dataclass(frozen=True)
class HardwareProfile:
    """Describes a cluster of equal nodes by data-sheet numbers; the defaults are those of H100 nodes.

    peak_flops: dense bf16 FLOP/s per GPU. mfu: share of the peak that is assumed while a GPU computes.
    memory_bytes: per GPU. reserve_bytes: part of it for the CUDA context, NCCL, kernel workspaces and fragmentation.
    memory_bandwidth: bytes/s a GPU reads and writes in its own memory. node_bandwidth: bytes/s a GPU sends within its
    node (NVLink, one direction). network_bandwidth: bytes/s a GPU sends to other nodes. storage_bandwidth: bytes/s that
    all ranks together write.
    """

    peak_flops: float = PEAK_FLOPS_BF16["H100"]
    mfu: float = 0.4
    gpus_per_node: int = 8
    memory_bytes: float = 80 * GIGA
    reserve_bytes: float = 8 * GIGA
    memory_bandwidth: float = 3350 * GIGA
    node_bandwidth: float = 450 * GIGA
    network_bandwidth: float = 50 * GIGA
    storage_bandwidth: float = 10 * GIGA

    @property
    def usable_bytes(self) -> float:
        """Memory of a GPU that tensors may fill."""
        return self.memory_bytes - self.reserve_bytes

    def bandwidth(self, span: int) -> float:
        """Return the bytes/s a GPU sends in a group whose members lie within `span` consecutive ranks."""
        return self.node_bandwidth if span <= self.gpus_per_node else self.network_bandwidth

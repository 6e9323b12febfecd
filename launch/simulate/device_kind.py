"""Describe kinds of device as far as tracing and compiling for them ask."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceKind:
    """Describes a device as far as compilation asks; sizes in bytes.

    shared_per_block, shared_per_multiprocessor: memory that the blocks of a kernel share.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    num_multiprocessors: int
    l2_cache: int
    shared_per_block: int = 227 << 10
    shared_per_multiprocessor: int = 228 << 10
    registers_per_multiprocessor: int = 1 << 16
    threads_per_multiprocessor: int = 2048
    blocks_per_multiprocessor: int = 32

    @property
    def architecture(self) -> int:
        """Return triton's number of the architecture, 90 for an H100."""
        return 10 * self.capability[0] + self.capability[1]


KINDS = {
    "h100": DeviceKind("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132, 50 << 20),
    "b200": DeviceKind("NVIDIA B200", (10, 0), 180 << 30, 148, 126 << 20),
}

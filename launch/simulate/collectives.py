"""Record what a rank sends: collectives by group and operation, in order, with their bytes and the line that asked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

# The operators that torch.distributed's functions call: the names of what they do.
OPERATIONS = {
    "c10d.allreduce_": "all-reduce",
    "c10d._allgather_base_": "all-gather",
    "c10d.allgather_": "all-gather",
    "c10d.allgather_into_tensor_coalesced_": "all-gather",
    "c10d._reduce_scatter_base_": "reduce-scatter",
    "c10d.reduce_scatter_": "reduce-scatter",
    "c10d.reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "c10d.broadcast_": "broadcast",
    "c10d.gather_": "gather",
    "c10d.scatter_": "scatter",
    "c10d.alltoall_base_": "all-to-all",
    "c10d.barrier": "barrier",
    "c10d.send": "send",
    "c10d.recv_": "receive",
}


@dataclass(frozen=True)
class Collective:
    """Describes one call. ranks: of its group, or the sender and the receiver. num_bytes: of the whole message."""

    operation: str
    ranks: tuple[int, ...]
    num_bytes: int
    line: str


def find_operation(func: Any) -> str | None:
    """Return what a dispatched operator does among ranks; None: nothing."""
    name = str(func)
    return OPERATIONS.get(name.rsplit(".", 1)[0]) if name.startswith("c10d.") else None


def describe_collective(operation: str, args: tuple[Any, ...], line: Callable[[], str]) -> Collective | None:
    """Describe a call from its operator's arguments; None in a group of one rank, where nothing is sent."""
    group = next(group for group in map(_unbox, tree_leaves(args)) if group is not None)
    ranks = tuple(dist.get_process_group_ranks(group))
    if len(ranks) == 1:
        return None
    me = dist.get_rank()
    if operation in ("send", "receive"):
        peer = ranks[args[2]]
        ranks = (me, peer) if operation == "send" else (peer, me)
    # A barrier's tensor is torch's own; of gathered and scattered messages the whole is the larger side.
    num_bytes = 0 if operation == "barrier" else max(map(_count_bytes, args[:2]))
    return Collective(operation, ranks, num_bytes, line())


def _count_bytes(value: object) -> int:
    return sum(item.numel() * item.element_size() for item in tree_leaves(value) if isinstance(item, Tensor))


def _unbox(item: object) -> dist.ProcessGroup | None:
    if not isinstance(item, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(item)
    except RuntimeError:  # another kind of object: the operation of a reduction
        return None

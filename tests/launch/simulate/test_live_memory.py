"""Storages are counted from when operators make them until nobody holds them."""

import torch

from launch.simulate.live_memory import LiveMemory, TensorOrigin

MIB = 2**20


def make_memory() -> LiveMemory:
    return LiveMemory("cpu", lambda: TensorOrigin("file.py:1", "layer", "forward 1"))


def test_views_are_not_counted_and_the_dead_are_gone() -> None:
    memory = make_memory()
    lasting, passing = torch.empty(MIB, dtype=torch.uint8), torch.empty(2 * MIB, dtype=torch.uint8)
    for tensor in (lasting, lasting.view(2, -1), passing, passing[:10]):
        memory.see(tensor)
    del tensor, passing
    last = torch.empty(MIB // 2, dtype=torch.uint8)
    memory.see(last)
    assert memory.replay() == [MIB, 3 * MIB, MIB, 3 * MIB // 2]
    assert memory.replay(start=2) == [MIB, 3 * MIB // 2]
    assert [item.num_bytes for item in memory.find_alive(1)] == [2 * MIB, MIB]
    assert [item.num_bytes for item in memory.find_alive(3)] == [MIB, MIB // 2]


def test_other_devices_do_not_count() -> None:
    memory = make_memory()
    memory.see(torch.empty(MIB, device="meta"))
    assert memory.events == []


def test_what_a_tensor_is_for_is_said_once() -> None:
    memory = make_memory()
    weights, gradients = torch.empty(MIB), torch.empty(MIB)
    memory.see(gradients)
    memory.name([weights], "weights")
    memory.name([weights, gradients], "gradients")
    assert [item.kind for item in memory.allocations] == ["gradients", "weights"]


def test_only_large_tensors_are_asked_where_they_come_from() -> None:
    memory = make_memory()
    small, large = torch.empty(10), torch.empty(MIB)
    memory.see(small)
    memory.see(large)
    assert [item.origin.line for item in memory.allocations] == ["", "file.py:1"]

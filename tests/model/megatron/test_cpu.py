"""The stand-ins for CUDA that megatron-core gets leave other devices as they are."""

import torch

from model.megatron import cpu


def test_models_are_still_made_on_the_device_that_is_asked_for() -> None:
    cpu.install()
    with torch.device("meta"):
        assert {torch.empty(2).device.type, torch.ones(2).device.type, torch.tensor([1]).device.type} == {"meta"}
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert torch.zeros(2).device.type == "cpu"
    assert torch.zeros(2, device="cuda").device.type == "cpu" or torch.cuda.is_available()

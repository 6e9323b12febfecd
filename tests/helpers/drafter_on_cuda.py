"""Worker: steps of the drafter's training on a CUDA device that is not there; prints what would run on it.

Prints JSON by step, {"operators", "programs", "gradients"}: calls of operators and of programs that torch.compile made,
and how many weights received a gradient. Steps: of the default objective; of a draft that is verified in a forward of
its own; of the default one with compiled layers, so that something is counted.
"""

import json

import torch
from torch import Tensor
from torch.nn import Parameter

from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import pretend
from lora.drafter.batches import DraftBatch
from lora.drafter.step import DraftStep
from tests.kernels.recording import Recorder, record
from tests.lora.drafter.test_step import make_batch, make_step
from tests.lora.drafter.test_verified_step import make_step as make_verified_step


def main() -> None:
    """Record forward and backward of the steps, and print the counts."""
    verified = make_verified_step(is_greedy_text=False).to(torch.bfloat16)
    steps = {"default": make_step(torch.bfloat16), "verified": verified, "compiled": make_step(torch.bfloat16)}
    steps["compiled"].base.encoder.compile(dynamic=False)
    batch = make_batch()
    pretend(KINDS["h100"])
    print(json.dumps({name: count(step, batch) for name, step in steps.items()}))


def count(step: DraftStep, batch: DraftBatch) -> dict[str, int]:
    """Return what a step would run."""
    recording = record(lambda recorder: differentiate(step, batch, recorder))
    programs = sum(one.name is None for one in recording.steps)
    operators = len(recording.steps) - programs
    return {"operators": operators, "programs": programs, "gradients": len(recording.results)}


def differentiate(step: DraftStep, batch: DraftBatch, recorder: Recorder) -> dict[str, Tensor]:
    """Return the gradients of a step whose weights and batch are on the pretended device."""
    for name, weight in list(step.named_parameters()):
        owner, _, last = name.rpartition(".")
        given = Parameter(recorder.give(name, weight), requires_grad=weight.requires_grad)
        step.get_submodule(owner)._parameters[last] = given
    step(batch.to(torch.device("cuda")))[0].backward()
    return {name: weight.grad for name, weight in step.named_parameters() if weight.grad is not None}


if __name__ == "__main__":
    main()

"""Worker: one step of the drafter's training on a CUDA device that is not there; prints what would run on it.

Prints JSON {"operators", "programs", "gradients"}: calls of operators and of programs that torch.compile made, and how
many weights received a gradient. argv: "compiled" compiles the layers, as decoding may, so that something is counted.
"""

import json
import sys

import torch
from torch import Tensor
from torch.nn import Parameter

from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import pretend
from lora.drafter.batches import DraftBatch
from lora.drafter.step import DraftStep
from tests.kernels.recording import Recorder, record
from tests.lora.drafter.test_step import make_batch, make_step


def main(*words: str) -> None:
    """Record forward and backward, and print the counts."""
    step, batch = make_step(torch.bfloat16), make_batch()
    if "compiled" in words:
        step.base.encoder.compile(dynamic=False)
    pretend(KINDS["h100"])
    recording = record(lambda recorder: differentiate(step, batch, recorder))
    programs = sum(one.name is None for one in recording.steps)
    operators = len(recording.steps) - programs
    print(json.dumps({"operators": operators, "programs": programs, "gradients": len(recording.results)}))


def differentiate(step: DraftStep, batch: DraftBatch, recorder: Recorder) -> dict[str, Tensor]:
    """Return the gradients of a step whose weights and batch are on the pretended device."""
    for name, weight in list(step.named_parameters()):
        owner, _, last = name.rpartition(".")
        given = Parameter(recorder.give(name, weight), requires_grad=weight.requires_grad)
        step.get_submodule(owner)._parameters[last] = given
    step(batch.to(torch.device("cuda")))[0].backward()
    return {name: weight.grad for name, weight in step.named_parameters() if weight.grad is not None}


if __name__ == "__main__":
    main(*sys.argv[1:])

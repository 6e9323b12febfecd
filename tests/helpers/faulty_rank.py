"""A rank whose training code has a fault that only a GPU would show: `... -m tests.helpers.faulty_rank FAULT ...`.

The rest of the command line is that of launch.simulate.one_rank. Faults are found by the lines marked `fault:` here.
"""

import sys
from typing import Any

import torch

from launch.simulate import one_rank
from launch.simulate.hooks import find_hook, replace_hook

SCORE = "model.megatron.tri_mode:TriModeModel.score"
SUM = "pretrain.step.schedule:_sum_over_ranks"


def read_loss() -> None:
    """Ask the device for every microbatch's loss."""
    score = find_hook(SCORE)

    def score_and_read(*args: Any) -> Any:
        loss, cross_entropy = score(*args)
        loss.item()  # fault: item
        return loss, cross_entropy

    replace_hook(SCORE, score_and_read)


def mix_devices() -> None:
    """Add a tensor of the CPU to one of the device."""
    score = find_hook(SCORE)

    def score_with_bias(self: Any, hidden: Any, *args: Any) -> Any:
        bias = torch.ones(hidden.shape[-1], dtype=hidden.dtype)
        return score(self, hidden + bias, *args)  # fault: cpu

    replace_hook(SCORE, score_with_bias)


def mix_formats() -> None:
    """Multiply hidden states in fp32 with weights in bf16."""
    score = find_hook(SCORE)

    def score_in_fp32(self: Any, hidden: Any, *args: Any) -> Any:
        logits = hidden.float() @ self.output_layer.weight.T  # fault: dtype
        return score(self, hidden, *args), logits

    replace_hook(SCORE, score_in_fp32)


def skip_collective() -> None:
    """Sum the losses on the first pipeline stage alone."""
    from megatron.core import parallel_state

    add_up = find_hook(SUM)

    def add_up_on_first(outputs: Any, device: torch.device) -> Any:
        if parallel_state.is_pipeline_first_stage():
            return add_up(outputs, device)
        return torch.ones(5, dtype=torch.float64, device=device)

    replace_hook(SUM, add_up_on_first)


FAULTS = {"item": read_loss, "cpu": mix_devices, "dtype": mix_formats, "collective": skip_collective}


def main() -> None:
    """Plant the fault of argv[1], and simulate the rank."""
    plant = FAULTS[sys.argv.pop(1)]
    original = one_rank.pretend

    def pretend_and_plant(kind: Any) -> None:
        original(kind)
        plant()

    one_rank.pretend = pretend_and_plant
    one_rank.main()


if __name__ == "__main__":
    main()

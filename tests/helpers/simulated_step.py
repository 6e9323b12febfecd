"""Record the schedule of a step twice: in a real job of gloo processes, and rank by rank on fake tensors.

`... -m tests.helpers.simulated_step {real,fake} FOLDER [--rank R --gpus N]` reads every FOLDER/<name>.yaml and writes
FOLDER/<name>_<real|fake>_<rank>.json. Both use operators that run on both devices: the norm and SwiGLU of CPUs, and the
stand-in for FlexAttention.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from conf.composition.compose import load_run_config
from conf.schema import RunConfig
from conf.system.entry import quiet_libraries
from launch.plan.step_work import TEXT
from launch.simulate.adaptations import adapt_to_one_rank, build_stand_in, remember_attended_pairs
from launch.simulate.device_kind import KINDS
from launch.simulate.device_tensors import DeviceTensors
from launch.simulate.fake_device import pretend
from launch.simulate.hooks import replace_hook
from launch.simulate.rank_report import Recording
from launch.simulate.rank_work import name_lasting, record
from launch.simulate.stand_ins import build_rank_trainer
from launch.simulate.step_recorder import StepRecorder
from model.megatron import cpu
from pretrain.run.model_parallel import model_parallel_groups
from pretrain.step.optimizer import compute_grad_norm, update_weights
from pretrain.step.schedule import run_schedule

recorders: list[StepRecorder] = []  # the last one is that of the step that runs


def main() -> None:
    """Record the steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=("real", "fake"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--gpus", type=int)
    arguments = parser.parse_args()
    quiet_libraries("torch.distributed")
    start = start_fake if arguments.device == "fake" else start_real
    start(arguments.rank, arguments.gpus)
    use_shared_kernels()
    for path in sorted(arguments.folder.glob("*.yaml")):
        recording = record_step(load_run_config(path), arguments.device)
        name = f"{path.stem}_{arguments.device}_{dist.get_rank()}.json"
        (arguments.folder / name).write_text(json.dumps(asdict(recording)), encoding="utf-8")
    dist.destroy_process_group()


def start_fake(rank: int, num_ranks: int) -> None:
    """Be one rank of a job that is not there, on a device that is not there."""
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    pretend(KINDS["h100"])
    adapt_to_one_rank(add_flops)


def start_real(*_: Any) -> None:
    """Be one rank of torchrun's on the CPU, whose attention is the stand-in for FlexAttention."""
    cpu.install()
    dist.init_process_group("gloo")
    remember_attended_pairs()
    replace_hook("model.attention.plan:fits_tiles", lambda *_: False)
    replace_hook("model.attention.plan:build_grouped_attention", lambda keys, *_: build_stand_in(keys, add_flops))


def add_flops(number: int) -> None:
    """Count FLOPs of attention for the step that runs."""
    recorders[-1].add_flops(number)


def use_shared_kernels() -> None:
    """Let both devices use the same operators."""
    for module in ("kernel_choice", "spec", "transformer_config"):
        replace_hook(f"model.megatron.{module}:choose_fused_operators", lambda: (False, "the same on both devices"))


def record_step(config: RunConfig, device: str) -> Recording:
    """Record forward, backward, norm and update; microbatches are prepared before."""
    recorders.append(StepRecorder("cuda" if device == "fake" else "cpu"))
    if device == "real":
        return record_schedule(config, recorders[-1], torch.device("cpu"))
    with DeviceTensors(recorders[-1].ask):
        return record_schedule(config, recorders[-1], torch.device("cuda", 0))


def record_schedule(config: RunConfig, recorder: StepRecorder, device: torch.device) -> Recording:
    """Build the trainer and record what it does."""
    groups = model_parallel_groups(config.parallel, config.runtime.timeout_minutes, config.train.seed)
    with groups, recorder.watching():
        trainer = build_rank_trainer(config, TEXT, device)
        name_lasting(trainer, recorder)
        step = trainer.builder.prepare(trainer.loader.microbatches(0))
        for chunk in trainer.model:
            chunk.zero_grad_buffer()

        def run() -> None:
            run_schedule(trainer.model, step, forward_only=False)
            update_weights(trainer.optimizer, compute_grad_norm(trainer.optimizer))

        return record(recorder, run)


if __name__ == "__main__":
    main()

"""Do on one rank what a job does in a step: train it, evaluate, and describe a checkpoint, all of it recorded."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from conf.schema import RunConfig
from launch.plan.step_work import SequenceKind
from launch.simulate.adaptations import adapt_to_one_rank
from launch.simulate.device_tensors import DeviceTensors
from launch.simulate.hooks import find_hook, replace_hook
from launch.simulate.rank_report import RankReport, Recording
from launch.simulate.stand_ins import build_rank_trainer
from launch.simulate.step_recorder import StepRecorder
from model.attention.positions import ForwardPositions
from pretrain.checkpointing.sharded_state import build_sharded_state, count_bytes
from pretrain.objective.scoring import StepCounts
from pretrain.run.model_parallel import model_parallel_groups
from pretrain.step.optimizer import list_torch_optimizers, prepare_for_loading
from pretrain.trainer import Trainer


def simulate_rank(config: RunConfig, kind: SequenceKind) -> RankReport:
    """Run a step, an evaluation and the description of a checkpoint; the process group exists."""
    started = time.monotonic()
    recorder = StepRecorder("cuda")
    adapt_to_one_rank(recorder.add_flops)
    tensors = DeviceTensors(recorder.ask)
    groups = model_parallel_groups(config.parallel, config.runtime.timeout_minutes, config.train.seed)
    with groups, tensors, recorder.watching():
        trainer = build_rank_trainer(config, kind, torch.device("cuda", 0))
        name_lasting(trainer, recorder)
        counts, noisy_lengths = record_counts(), record_noisy_lengths()
        step = record(recorder, trainer.train_step)
        evaluation = record(recorder, trainer.evaluate)
        tensors.fakes_all = True
        return RankReport(
            rank=dist.get_rank(),
            seconds=time.monotonic() - started,
            place=find_place(),
            groups=name_groups(),
            parameters=sum(parameter.numel() for chunk in trainer.model for parameter in chunk.parameters()),
            positions=counts[0].computed_positions,
            noisy_lengths=noisy_lengths[: len(trainer.loader.microbatches(0))],
            attended_pairs=counts[0].attended_pairs,
            scored_positions=counts[0].clean + counts[0].masked,
            step=step,
            evaluation=evaluation,
            saved_bytes=count_bytes(build_sharded_state(trainer.model, trainer.optimizer, is_loading=False)),
        )


def name_lasting(trainer: Trainer, recorder: StepRecorder) -> None:
    """Say what the tensors are for that outlive steps. Adam's moments are made, which else the first update does."""
    prepare_for_loading(trainer.optimizer)
    for chunk in trainer.model:
        recorder.modules.follow(chunk.module.named_modules())
        recorder.memory.name(chunk.parameters(), "weights")
        for buffer in chunk.buffers:
            recorder.memory.name([buffer.grad_data], "gradients")
    for optimizer in list_torch_optimizers(trainer.optimizer):
        for group in optimizer.param_groups:
            recorder.memory.name(group["params"], "optimizer")
        for state in optimizer.state.values():
            recorder.memory.name((value for value in state.values() if isinstance(value, Tensor)), "optimizer")


def record(recorder: StepRecorder, action: Callable[[], object]) -> Recording:
    """Record what `action` does."""
    recorder.begin()
    start = recorder.memory.count_events()
    action()
    return Recording.of(recorder, start)


def record_counts() -> list[StepCounts]:
    """Return a list that gets this rank's own counts of every step that is prepared from now on."""
    counts: list[StepCounts] = []
    hook = "pretrain.step.microbatches:_sum_over_data_parallel"
    add_up = find_hook(hook)

    def note(local: StepCounts, device: torch.device) -> StepCounts:
        counts.append(local)
        return add_up(local, device)

    replace_hook(hook, note)
    return counts


def record_noisy_lengths() -> list[int]:
    """Return a list that gets the noisy positions of every forward that is prepared from now on, on this rank."""
    lengths: list[int] = []
    hook = "pretrain.step.microbatches:choose_positions"
    choose = find_hook(hook)

    def note(*args: Any) -> ForwardPositions:
        positions = choose(*args)
        lengths.append(positions.noisy.shape[1])
        return positions

    replace_hook(hook, note)
    return lengths


def find_place() -> dict[str, int]:
    """Return the number of this rank in each kind of group."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "context": parallel_state.get_context_parallel_rank(),
        "data": parallel_state.get_data_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
    }


def name_groups() -> dict[str, list[int]]:
    """Return the ranks of each kind of group that this rank belongs to; "data" includes context-parallel ranks.

    Of groups with the same ranks the last names what is sent: the gradients of a world that is all data-parallel, say.
    """
    groups = {
        "world": None,
        "model": parallel_state.get_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}

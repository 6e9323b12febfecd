"""Predict everything about one configuration on a number of GPUs."""

from dataclasses import dataclass, replace

from conf.rules.run import check_rules
from conf.schema import Objective, RunConfig
from launch.plan.communication import Traffic, estimate_traffic
from launch.plan.hardware_profile import HardwareProfile
from launch.plan.memory import PipelineStageMemory, estimate_memory
from launch.plan.rank_shape import RankShape, build_rank_shape
from launch.plan.step_time import StepTime, estimate_step_time
from launch.plan.step_work import TEXT, SequenceKind, StepWork, count_work
from pretrain.costs import compute_tensor_bytes

SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class LayoutPlan:
    """Holds the predictions for one configuration on `num_gpus` GPUs.

    shape: of one rank. work: of one step on all GPUs. ar_work: the same step without diffusion. memory: per pipeline
    stage. traffic: what a GPU sends per step. checkpoint_bytes: of one complete checkpoint, with optimizer state.
    """

    config: RunConfig
    num_gpus: int
    hardware: HardwareProfile
    shape: RankShape
    work: StepWork
    ar_work: StepWork
    memory: list[PipelineStageMemory]
    traffic: list[Traffic]
    time: StepTime
    parameters: int
    checkpoint_bytes: int

    @property
    def fullest(self) -> PipelineStageMemory:
        """Memory of the pipeline stage that needs most."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Whether every pipeline stage stays within a GPU's memory less the reserve."""
        return self.fullest.total <= self.hardware.usable_bytes

    @property
    def not_modelled(self) -> list[str]:
        """A phrase for each setting of the configuration that no estimate takes into account."""
        parallel, fp8 = self.config.parallel, self.config.precision.fp8
        effects = {
            "precision.fp8": (fp8 is not None, "memory and time are those of bf16"),
            "parallel.offload_layers": (parallel.offload_layers > 0, "memory and time are those without"),
            "parallel.overlap_tensor_parallel": (parallel.overlap_tensor_parallel, "its collectives count in full"),
            "parallel.overlap_pipeline": (parallel.overlap_pipeline, "its sends count in full"),
        }
        return [f"{key}: {effect}" for key, (is_asked, effect) in effects.items() if is_asked]

    @property
    def mfu(self) -> float:
        """Useful FLOPs of the predicted step divided by what the GPUs could do in its time."""
        return self.work.total_flops / (self.time.total * self.num_gpus * self.hardware.peak_flops)

    @property
    def days_at_stated_mfu(self) -> float:
        """Days of the whole run if the step as a whole reached the stated MFU."""
        return self.config.num_steps * self.time.compute / SECONDS_PER_DAY

    @property
    def days(self) -> float:
        """Days of the whole run, with this layout's own costs."""
        return self.config.num_steps * self.time.total / SECONDS_PER_DAY

    @property
    def save_seconds(self) -> float:
        """Seconds to write one checkpoint at the stated storage bandwidth."""
        return self.checkpoint_bytes / self.hardware.storage_bandwidth


def plan_layout(config: RunConfig, num_gpus: int, hardware: HardwareProfile, kind: SequenceKind = TEXT) -> LayoutPlan:
    """Predict memory, time, traffic and checkpoints of a configuration on sequences of this kind.

    Memory is that of the longest forwards, time and traffic those of expected ones.

    Raises:
        ConfigError: The configuration cannot run on this number of GPUs.
    """
    check_rules(config, num_gpus)
    shape = build_rank_shape(config, num_gpus, kind=kind)
    work = count_work(config, kind)
    expected = replace(shape, noisy_length=work.noisy_length)
    traffic = estimate_traffic(expected)
    return LayoutPlan(
        config=config,
        num_gpus=num_gpus,
        hardware=hardware,
        shape=shape,
        work=work,
        ar_work=count_work(_without_diffusion(config), kind),
        memory=estimate_memory(shape),
        traffic=traffic,
        time=estimate_step_time(expected, work, traffic, hardware),
        parameters=config.model.num_parameters,
        checkpoint_bytes=compute_tensor_bytes(config.model, config.precision.dtype),
    )


def list_overrides(config: RunConfig, base: RunConfig | None = None) -> list[str]:
    """Return the keys that choose a layout on a command line; with `base`, only those in which it differs from that."""
    given = _layout_keys(base) if base else {}
    return [f"{key}={value}" for key, value in _layout_keys(config).items() if value != given.get(key)]


def _layout_keys(config: RunConfig) -> dict[str, str]:
    parallel = config.parallel
    return {
        "parallel.tensor_parallel": str(parallel.tensor_parallel),
        "parallel.context_parallel": str(parallel.context_parallel),
        "parallel.pipeline_parallel": str(parallel.pipeline_parallel),
        "parallel.virtual_pipeline_parallel": str(parallel.virtual_pipeline_parallel),
        "parallel.sequence_parallel": str(parallel.sequence_parallel).lower(),
        "parallel.recompute": parallel.recompute.value,
        "train.micro_batch_size": str(config.train.micro_batch_size),
    }


def _without_diffusion(config: RunConfig) -> RunConfig:
    return replace(config, stage=replace(config.stage, objective=Objective.ar))

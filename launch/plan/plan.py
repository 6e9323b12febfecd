"""Everything the command says about one configuration."""

from dataclasses import dataclass, replace

from conf.rules.run import check_rules
from conf.schema import Objective, RunConfig
from launch.plan.communication import Traffic, estimate_traffic
from launch.plan.hardware import Hardware
from launch.plan.memory import StageMemory, estimate_memory
from launch.plan.shape import Shape, build_shape
from launch.plan.step_time import StepTime, estimate_step_time
from launch.plan.work import StepWork, count_work
from pretrain.checkpointing.size import compute_tensor_bytes

SECONDS_PER_DAY = 86400


@dataclass(frozen=True)
class Plan:
    """One configuration on `num_gpus` GPUs.

    ar_work: the same step without diffusion. checkpoint_bytes: of one complete checkpoint, optimizer state included.
    """

    config: RunConfig
    num_gpus: int
    hardware: Hardware
    shape: Shape
    work: StepWork
    ar_work: StepWork
    memory: list[StageMemory]
    traffic: list[Traffic]
    time: StepTime
    parameters: int
    checkpoint_bytes: int

    @property
    def worst(self) -> StageMemory:
        """The pipeline stage with most memory in use."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Whether every stage stays within a GPU's memory less the reserve."""
        return self.worst.total <= self.hardware.usable_bytes

    @property
    def not_modelled(self) -> list[str]:
        """What the configuration asks for and no estimate knows of; a phrase each."""
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
        """Useful FLOPs of the predicted step over what the GPUs could do in its time."""
        return self.work.total_flops / (self.time.total * self.num_gpus * self.hardware.peak_flops)

    @property
    def days_at_stated_mfu(self) -> float:
        """Of the whole run, if the stated MFU is what the step reaches as a whole."""
        return self.config.num_steps * self.time.compute / SECONDS_PER_DAY

    @property
    def days(self) -> float:
        """Of the whole run, with this layout's own costs."""
        return self.config.num_steps * self.time.total / SECONDS_PER_DAY

    @property
    def save_seconds(self) -> float:
        """Of one checkpoint at the stated storage bandwidth."""
        return self.checkpoint_bytes / self.hardware.storage_bandwidth


def build_plan(config: RunConfig, num_gpus: int, hardware: Hardware, document_tokens: int | None = None) -> Plan:
    """Raises ConfigError if the configuration cannot run on so many GPUs."""
    check_rules(config, num_gpus)
    shape = build_shape(config, num_gpus)
    work, traffic = count_work(config, document_tokens), estimate_traffic(shape)
    return Plan(
        config=config,
        num_gpus=num_gpus,
        hardware=hardware,
        shape=shape,
        work=work,
        ar_work=count_work(_without_diffusion(config), document_tokens),
        memory=estimate_memory(shape),
        traffic=traffic,
        time=estimate_step_time(shape, work, traffic, hardware),
        parameters=config.model.num_parameters,
        checkpoint_bytes=compute_tensor_bytes(config.model, config.precision.dtype),
    )


def _without_diffusion(config: RunConfig) -> RunConfig:
    return replace(config, stage=replace(config.stage, objective=Objective.ar))

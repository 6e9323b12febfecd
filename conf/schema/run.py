"""The whole configuration of one run: what Hydra composes and everything below the entry files receives."""

from dataclasses import dataclass, field
from enum import Enum
from math import gcd, lcm
from typing import Any, Optional

from omegaconf import MISSING

from conf.schema.data import DataConfig
from conf.schema.model import ModelConfig
from conf.schema.optimization import OptimizerConfig, PrecisionConfig, ScheduleConfig
from conf.schema.parallel import ParallelConfig
from conf.schema.stage import Objective, StageConfig

ATTENTION_TILE = 128  # positions of a tile of FlexAttention (model/attention/tiles.py)
MOST_NOISY_LENGTHS = 8


class Device(Enum):
    """auto: CUDA when a device is there, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class AttentionBackend(Enum):
    """Implementation of attention.

    auto: flex on CUDA, cpu on the CPU. flex: FlexAttention. cpu: tiled for one document, grouped under masks for packed
    ones (model/attention/plan.py chooses).
    """

    auto = "auto"
    cpu = "cpu"
    flex = "flex"


class ResumeMode(Enum):
    """auto: continue the run folder's newest complete checkpoint if there is one. never: refuse a used folder."""

    auto = "auto"
    never = "never"


class SaveFailure(Enum):
    """Consequence of a checkpoint that could not be written.

    stop: the run ends with the error. go_on: the error is logged, and the next checkpoint is due as usual.
    """

    stop = "stop"
    go_on = "go_on"


class SpikePolicy(Enum):
    """Consequence of a loss far above those before it.

    report: the log names it. skip: its update is left out. roll_back: the newest checkpoint is loaded, and the data
    since are left out.
    """

    report = "report"
    skip = "skip"
    roll_back = "roll_back"


@dataclass
class TrainConfig:
    """Length and batch of the run.

    tokens: clean tokens to train on; steps are derived (floor of tokens / tokens per step, at least 1).
    global_batch_size, micro_batch_size: sequences per optimizer step and per forward pass of one rank.
    seed: of weights, data order and noise.
    """

    tokens: float = MISSING
    global_batch_size: int = 512
    micro_batch_size: int = 1
    seed: int = 1234


@dataclass
class EvaluationConfig:
    """Held-out losses, with the same data and the same noise at every evaluation.

    every_steps: steps between evaluations; there is always one before the first step and one at the end.
    sequences: held-out sequences used; at most what the dataset has.
    """

    every_steps: int = 500
    sequences: int = 256


@dataclass
class CheckpointConfig:
    """Checkpoints of a run.

    every_steps: steps between checkpoints; 0 saves at the end only.
    keep: newest complete checkpoints that stay; older ones are deleted after a newer one is complete.
    asynchronous: write in the background while training goes on.
    on_failure: see SaveFailure; of a save that the disk does not take.
    """

    every_steps: int = 1000
    keep: int = 2
    asynchronous: bool = False
    on_failure: SaveFailure = SaveFailure.stop


@dataclass
class GuardConfig:
    """Protection against steps that cannot be trusted. An update of NaN or infinite gradients is never applied.

    max_nonfinite_steps: such steps in a row after which the run stops.
    spike_policy: see SpikePolicy. spike_factor: a loss above this multiple of the median of the last `window` losses is
    a spike; ten in a row are its new level. window: steps. max_spikes: updates skipped, or times rolled back, in one
    run before it stops.
    """

    max_nonfinite_steps: int = 5
    spike_policy: SpikePolicy = SpikePolicy.report
    spike_factor: float = 2.0
    window: int = 64
    max_spikes: int = 10


@dataclass
class RuntimeConfig:
    """Settings of a process; none changes the result beyond rounding.

    device: see Device. attention_backend: see AttentionBackend.
    loss_chunk_rows: hidden rows per chunk of head and cross entropy; bounds logits memory.
    log_every_steps: steps between lines on the console (every step is in metrics.jsonl).
    progress_bar: show one on rank 0's terminal. tensorboard: write event files.
    wandb_project: project of Weights & Biases to report to; null reports nowhere.
    timeout_minutes: of collectives. stall_timeout_minutes: without a step, save or evaluation after which a process
    writes its stacks to logs/stall_rank_<r>.txt and ends.
    straggler_factor: a rank whose part of a step takes longer than this multiple of the median is named in the log.
    compile_cache: folder of compiled kernels, which later starts load instead of compiling; null keeps none.
    """

    device: Device = Device.auto
    attention_backend: AttentionBackend = AttentionBackend.auto
    loss_chunk_rows: int = 1024
    log_every_steps: int = 10
    progress_bar: bool = True
    tensorboard: bool = True
    wandb_project: Optional[str] = None
    timeout_minutes: float = 30.0
    stall_timeout_minutes: float = 60.0
    straggler_factor: float = 1.5
    compile_cache: Optional[str] = "${run.dir}/kernels"


@dataclass
class RunFolderConfig:
    """Where a run lives: `dir` holds config.yaml, starts/, logs/, metrics.jsonl, tensorboard/, kernels/, checkpoints/.

    root, name: parent folder and name of the run; dir defaults to root/name.
    """

    root: str = "runs"
    name: str = MISSING
    dir: str = "${run.root}/${run.name}"


@dataclass
class ResumeConfig:
    """Treatment of a run folder that is in use.

    mode: see ResumeMode. allow_data_change: continue although a source or a sequence holds other data than then.
    """

    mode: ResumeMode = ResumeMode.auto
    allow_data_change: bool = False


@dataclass
class RunConfig:
    """One training run.

    init_from: Hugging Face directory or another run (or step) folder, of which only the weights are read.
    experiment: name of the composed experiment, for the record.
    """

    stage: StageConfig = field(default_factory=StageConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    init_from: Optional[str] = None
    experiment: Any = None

    @property
    def tokens_per_step(self) -> int:
        """Clean tokens of one optimizer step."""
        return self.train.global_batch_size * self.data.sequence_length

    @property
    def positions_per_forward(self) -> int:
        """Positions of one forward at most, all sequences of a microbatch together, on a context-parallel rank."""
        positions = self.train.micro_batch_size * self.stage.positions_per_token * self.data.sequence_length
        return positions // self.parallel.context_parallel

    @property
    def noisy_lengths(self) -> tuple[int, ...]:
        """Lengths that the noisy part of a forward may have on a context-parallel rank, ascending; none without noise.

        Live noisy blocks are filled up to one of them (model/attention/live.py). They are few, for kernels are compiled
        for each; the last one holds all blocks. Positions of a forward divide over what splits them, and are whole
        tiles of the attention kernel where there are that many.
        """
        whole, parallel = self.data.sequence_length // self.parallel.context_parallel, self.parallel
        if self.stage.objective is not Objective.joint:
            return ()
        if parallel.overlap_tensor_parallel:
            return (whole,)  # Transformer Engine's buffers hold forwards of one length
        unit = parallel.tensor_parallel if parallel.sequence_parallel else 1
        if self.precision.fp8 is not None:
            unit *= self.precision.fp8.multiple // gcd(self.precision.fp8.multiple, self.train.micro_batch_size)
        if whole >= MOST_NOISY_LENGTHS * ATTENTION_TILE:
            unit = lcm(unit, ATTENTION_TILE)
        wanted = (whole + -(-whole * part // MOST_NOISY_LENGTHS) for part in range(1, MOST_NOISY_LENGTHS + 1))
        lengths = {min(whole, -(-positions // unit) * unit - whole) for positions in wanted}
        return tuple(sorted(lengths))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(1, int(self.train.tokens) // self.tokens_per_step)

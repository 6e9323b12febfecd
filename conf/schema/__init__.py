"""Typed schema of every configuration: the single place where a default is written."""

from conf.schema.data import (
    DataConfig,
    DocumentKind,
    InputConfig,
    OverlongChat,
    PrepareConfig,
    SourceConfig,
    Split,
)
from conf.schema.model import ModelConfig, RopeConfig
from conf.schema.optimization import (
    DecayShape,
    Dtype,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    ScheduleKind,
)
from conf.schema.parallel import ParallelConfig, Recompute
from conf.schema.run import (
    AttentionBackend,
    CheckpointConfig,
    Device,
    EvaluationConfig,
    GuardConfig,
    ResumeConfig,
    ResumeMode,
    RunConfig,
    RunFolderConfig,
    RuntimeConfig,
    SaveFailure,
    SpikePolicy,
    TrainConfig,
)
from conf.schema.stage import LossNormalization, Objective, StageConfig

__all__ = [
    "AttentionBackend",
    "CheckpointConfig",
    "DataConfig",
    "DecayShape",
    "Device",
    "DocumentKind",
    "Dtype",
    "EvaluationConfig",
    "GuardConfig",
    "InputConfig",
    "LossNormalization",
    "ModelConfig",
    "Objective",
    "OptimizerConfig",
    "OverlongChat",
    "ParallelConfig",
    "PrecisionConfig",
    "PrepareConfig",
    "Recompute",
    "ResumeConfig",
    "ResumeMode",
    "RopeConfig",
    "RunConfig",
    "RunFolderConfig",
    "RuntimeConfig",
    "SaveFailure",
    "ScheduleConfig",
    "ScheduleKind",
    "SourceConfig",
    "SpikePolicy",
    "Split",
    "StageConfig",
    "TrainConfig",
]

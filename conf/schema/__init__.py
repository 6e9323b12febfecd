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
    ResumeConfig,
    ResumeMode,
    RunConfig,
    RunFolderConfig,
    RuntimeConfig,
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
    "ScheduleConfig",
    "ScheduleKind",
    "SourceConfig",
    "Split",
    "StageConfig",
    "TrainConfig",
]

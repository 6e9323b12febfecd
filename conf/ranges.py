"""The range every number of the configuration must lie in, as one table."""

from collections.abc import Iterator
from functools import reduce
from math import isfinite
from typing import Any

from conf.schema import RunConfig

POSITIVE = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.head_dim",
    "model.vocab_size",
    "model.rms_norm_eps",
    "model.max_position_embeddings",
    "model.init_std",
    "model.rope.theta",
    "model.rope.factor",
    "model.rope.original_max_position_embeddings",
    "model.rope.beta_fast",
    "model.rope.beta_slow",
    "data.sequence_length",
    "data.prepare.shard_bytes",
    "data.prepare.heldout_every",
    "stage.block_size",
    "parallel.tensor_parallel",
    "parallel.pipeline_parallel",
    "parallel.virtual_pipeline_parallel",
    "optimizer.epsilon",
    "schedule.peak_lr",
    "train.tokens",
    "train.global_batch_size",
    "train.micro_batch_size",
    "evaluation.sequences",
    "checkpoint.keep",
    "runtime.loss_chunk_rows",
    "runtime.log_every_steps",
    "runtime.timeout_minutes",
)
NOT_NEGATIVE = (
    "model.rope.mscale",
    "model.rope.mscale_all_dim",
    "model.rope.llama_4_scaling_beta",
    "stage.diffusion_weight",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "schedule.final_lr",
    "data.prefetch_steps",
    "data.prepare.workers",
    "train.seed",
    "evaluation.every_steps",
    "checkpoint.every_steps",
)
ZERO_TO_ONE = ("schedule.warmup_fraction", "schedule.decay_fraction", "data.prepare.max_skipped_share")
BELOW_ONE = ("optimizer.beta1", "optimizer.beta2")  # from 0, 1 excluded
BETWEEN = ("stage.noise_epsilon",)  # 0 and 1 excluded


def broken_ranges(config: RunConfig) -> Iterator[str]:
    """One message per number out of its range, or not finite."""
    tables = (
        (POSITIVE, lambda value: value > 0, "must be positive"),
        (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
        (ZERO_TO_ONE, lambda value: 0 <= value <= 1, "must lie between 0 and 1"),
        (BELOW_ONE, lambda value: 0 <= value < 1, "must lie between 0 and 1, 1 excluded"),
        (BETWEEN, lambda value: 0 < value < 1, "must lie between 0 and 1, both excluded"),
    )
    for keys, fits, requirement in tables:
        for key in keys:
            value = read_key(config, key)
            if not (isfinite(value) and fits(value)):
                yield f"{key}={value} {requirement}"


def read_key(config: RunConfig, dotted: str) -> Any:
    """The value at a dotted key."""
    return reduce(getattr, dotted.split("."), config)

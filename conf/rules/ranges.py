"""Ranges in which the numbers of a configuration must lie, as one table for each configuration."""

from collections.abc import Iterator
from functools import reduce
from math import isfinite
from typing import Any, NamedTuple

LIMIT = 1 << 63  # seeds and the indices of samples are signed 64-bit numbers


class Ranges(NamedTuple):
    """Dotted keys of numbers by the range they must lie in. Each is also finite and below LIMIT; null is allowed.

    below_one: 0 to 1, 1 excluded. between: 0 to 1, both excluded.
    """

    positive: tuple[str, ...] = ()
    not_negative: tuple[str, ...] = ()
    zero_to_one: tuple[str, ...] = ()
    below_one: tuple[str, ...] = ()
    between: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that have a range."""
        return sum(self, ())


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
    *(f"model.vision.{name}" for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")),
    *(f"model.vision.{name}" for name in ("patch_size", "merge_size", "image_size", "rope_theta")),
    "data.sequence_length",
    "data.prepare.shard_bytes",
    "data.prepare.heldout_every",
    "stage.block_size",
    "parallel.tensor_parallel",
    "parallel.context_parallel",
    "parallel.pipeline_parallel",
    "parallel.virtual_pipeline_parallel",
    "parallel.bucket_parameters",
    "optimizer.epsilon",
    "stage.tower_lr",
    "stage.projector_lr",
    "schedule.peak_lr",
    "train.tokens",
    "train.global_batch_size",
    "train.micro_batch_size",
    "evaluation.sequences",
    "checkpoint.keep",
    "runtime.loss_chunk_rows",
    "runtime.log_every_steps",
    "runtime.timeout_minutes",
    "runtime.stall_timeout_minutes",
    "runtime.straggler_factor",
    "guard.max_nonfinite_steps",
    "guard.spike_factor",
    "guard.window",
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
    "data.image_workers",
    "data.prepare.workers",
    "train.seed",
    "evaluation.every_steps",
    "checkpoint.every_steps",
    "guard.max_spikes",
    "parallel.offload_layers",
)
ZERO_TO_ONE = ("schedule.warmup_fraction", "schedule.decay_fraction", "data.prepare.max_skipped_share")
BELOW_ONE = ("optimizer.beta1", "optimizer.beta2")
BETWEEN = ("stage.noise_epsilon",)
RUN_RANGES = Ranges(POSITIVE, NOT_NEGATIVE, ZERO_TO_ONE, BELOW_ONE, BETWEEN)


def broken_ranges(config: Any, ranges: Ranges) -> Iterator[str]:
    """Yield one message per number of `config`, a dataclass, that is out of its range or not finite."""
    tables = (
        (ranges.positive, lambda value: value > 0, "must be positive"),
        (ranges.not_negative, lambda value: value >= 0, "must not be negative"),
        (ranges.zero_to_one, lambda value: 0 <= value <= 1, "must lie between 0 and 1"),
        (ranges.below_one, lambda value: 0 <= value < 1, "must lie between 0 and 1, 1 excluded"),
        (ranges.between, lambda value: 0 < value < 1, "must lie between 0 and 1, both excluded"),
    )
    for keys, fits, requirement in tables:
        for key in keys:
            value = read_key(config, key)
            if value is None:
                continue
            if not (isfinite(value) and fits(value)):
                yield f"{key}={value} {requirement}"
            elif value >= LIMIT:
                yield f"{key}={value} must be smaller than 2^63"


def read_key(config: Any, dotted: str) -> Any:
    """Return the value at a dotted key; None where a part of it is."""
    return reduce(lambda value, name: None if value is None else getattr(value, name), dotted.split("."), config)

"""Contradictions between settings are found before anything starts, all of them at once, each with a remedy."""

import copy
from functools import cache
from typing import Any

import pytest

from conf.composition.blends import ANY_NAME
from conf.composition.compose import compose_run_config
from conf.composition.trees import RUN_TREE
from conf.rules.layout import data_parallel_size
from conf.rules.ranges import RUN_RANGES, read_key
from conf.rules.run import check_rules
from conf.schema import RunConfig, VisionConfig
from conf.system.errors import ConfigError
from tests.helpers.layouts import CP2, PP2, PP2_INTERLEAVED, TP2, TP2_PP2, TP2_SP_CP2, TP4, TP8

GIVEN = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer", "train.tokens=1e6"]


def violations(*overrides: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        check_rules(compose_run_config([*GIVEN, *overrides]), world_size)
    return str(caught.value)


@cache
def default_config() -> RunConfig:
    return compose_run_config(GIVEN)


def out_of_range(key: str, value: Any) -> str:
    """Return the error message for the default configuration with one value replaced (composing anew would be slow)."""
    config = copy.deepcopy(default_config())
    config.model.vision = VisionConfig()
    parent, _, name = key.rpartition(".")
    setattr(read_key(config, parent), name, value)
    with pytest.raises(ConfigError) as caught:
        check_rules(config, world_size=1)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 8, 512])
def test_the_defaults_work_on_any_world_size_that_divides_the_batch(world_size: int) -> None:
    check_rules(default_config(), world_size)


@pytest.mark.parametrize(
    ("overrides", "world_size", "named"),
    [
        (["model.num_attention_heads=5"], 1, ["model.num_attention_heads=5", "model.num_key_value_heads=2"]),
        (["model.head_dim=63"], 1, ["model.head_dim=63", "even"]),
        (TP4, 4, ["model.num_key_value_heads=2", "parallel.tensor_parallel=4", "choose among 1, 2"]),
        ([*TP2, "model.vocab_size=385"], 2, ["model.vocab_size=385", "parallel.tensor_parallel=2"]),
        ([*TP2, "model.ffn_hidden_size=511"], 2, ["model.ffn_hidden_size=511"]),
        ([*PP2, "model.num_layers=5"], 2, ["model.num_layers=5", "parallel.pipeline_parallel=2"]),
        ([*PP2_INTERLEAVED, "model.num_layers=6"], 2, ["parallel.virtual_pipeline_parallel=2"]),
        (["parallel.virtual_pipeline_parallel=2"], 1, ["parallel.pipeline_parallel of 2 or more"]),
        (["stage=joint", "data.sequence_length=100"], 1, ["data.sequence_length=100", "stage.block_size=32", "=96"]),
        (["data.sequence_length=16384"], 1, ["data.sequence_length=16384", "model.max_position_embeddings=8192"]),
        (["parallel.sequence_parallel=true"], 1, ["parallel.sequence_parallel", "parallel.tensor_parallel"]),
        (["parallel.overlap_param_gather=true"], 1, ["parallel.overlap_grad_reduce=true"]),
        (["parallel.bucket_parameters=1000"], 1, ["no effect", "parallel.overlap_grad_reduce=true"]),
        (["parallel.overlap_grad_reduce=true", "parallel.bucket_parameters=0"], 1, ["must be positive"]),
        (["train.seed=18446744073709551615"], 1, ["train.seed=18446744073709551615 must be smaller than 2^63"]),
        (["train.tokens=1e30"], 1, ["train.tokens=1e+30 must be smaller than 2^63"]),
        (["stage=joint", *CP2, "stage.block_size=10", "data.sequence_length=192"], 2, ["length=160"]),
        (["schedule.final_lr=1"], 1, ["schedule.final_lr=1", "schedule.peak_lr=1e-05"]),
        (["schedule.decay_fraction=0.995"], 1, ["schedule.warmup_fraction=0.01", "schedule.decay_fraction=0.995"]),
        (["model.rope.beta_slow=40"], 1, ["model.rope.beta_fast=32", "model.rope.beta_slow=40"]),
        (["runtime=cpu", "runtime.attention_backend=flex"], 1, ["runtime.attention_backend=cpu"]),
        (TP2_PP2, 6, ["6 ranks", "= 4", "--nproc_per_node=4"]),
        (["train.global_batch_size=6", "train.micro_batch_size=2"], 2, ["train.global_batch_size=6", "=4"]),
        ([*PP2_INTERLEAVED, "train.global_batch_size=3"], 2, ["3 microbatches", "pipeline_parallel=2"]),
        (["run.name=''"], 1, ["run.name is empty"]),
        ([*CP2, "data.sequence_length=4098", "stage.block_size=2"], 2, ["not a multiple of 4", "=4096"]),
        (
            ["stage=joint", "parallel.context_parallel=4", "data.sequence_length=768", "stage.block_size=64"],
            4,
            ["8 chunks of 96 tokens", "stage.block_size=64", "data.sequence_length=512"],
        ),
        (TP2_SP_CP2, 6, ["6 ranks", "parallel.context_parallel=2", "--nproc_per_node=4"]),
    ],
)
def test_a_violated_rule_names_the_keys_the_values_and_a_remedy(
    overrides: list[str], world_size: int, named: list[str]
) -> None:
    message = violations(*overrides, world_size=world_size)
    for part in named:
        assert part in message


def test_sequence_parallelism_splits_both_halves_of_the_joint_stage() -> None:
    layout = ["parallel.tensor_parallel=4", "parallel.sequence_parallel=true", "model.num_key_value_heads=4"]
    odd = [*layout, "data.sequence_length=6", "stage.block_size=2"]
    check_rules(compose_run_config([*GIVEN, *odd, "stage=joint"]), 4)  # 12 positions
    assert "splits 6 positions" in violations(*odd, "stage=ar", world_size=4)


def test_without_noise_context_parallelism_may_cut_blocks() -> None:
    layout = ["parallel.context_parallel=4", "data.sequence_length=768", "stage.block_size=64"]
    check_rules(compose_run_config([*GIVEN, *layout, "stage=ar"]), 4)


def test_sequence_parallelism_splits_the_positions_of_a_context_parallel_rank() -> None:
    layout = ["parallel.tensor_parallel=4", "parallel.sequence_parallel=true", "model.num_key_value_heads=4"]
    message = violations(
        *layout, "parallel.context_parallel=2", "stage=ar", "data.sequence_length=4", "stage.block_size=1", world_size=8
    )
    assert "splits 2 positions (1 * data.sequence_length / parallel.context_parallel=2)" in message


def test_ranks_that_share_sequences_are_no_data_parallel_ones() -> None:
    config = compose_run_config([*GIVEN, *TP2_SP_CP2])
    assert data_parallel_size(config, 16) == 4
    assert config.parallel.describe(16) == "TP2 CP2 PP1 DP4 SP"


def test_the_other_schedules_and_layouts_are_not_held_to_rules_that_do_not_concern_them() -> None:
    check_rules(compose_run_config([*GIVEN, "schedule=cosine", "schedule.decay_fraction=1"]), 1)
    check_rules(compose_run_config([*GIVEN, *PP2, "train.global_batch_size=3"]), 2)


def test_all_violations_are_listed_at_once() -> None:
    message = violations(*TP8, "model.num_attention_heads=4", "data.sequence_length=100", "train.seed=-1", world_size=6)
    for part in ("5 settings", "train.seed=-1", "num_attention_heads", "num_key_value_heads", "=100", "6 ranks"):
        assert part in message


@pytest.mark.parametrize("key", RUN_RANGES.keys)
def test_every_number_is_refused_outside_its_range(key: str) -> None:
    assert f"{key}=-1" in out_of_range(key, -1)


@pytest.mark.parametrize("key", RUN_RANGES.positive)
def test_zero_is_reported_and_never_divided_by(key: str) -> None:
    assert f"{key}=0" in out_of_range(key, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_must_be_finite(value: float) -> None:
    assert f"train.tokens={value}" in out_of_range("train.tokens", value)


def test_every_number_of_the_schema_has_a_range() -> None:
    config = default_config()
    config.model.vision = VisionConfig()
    values = {key: read_key(config, key) for key in RUN_TREE.keys if ANY_NAME not in key}
    numbers = {key for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    unset = {"parallel.bucket_parameters"}  # a number, null by default
    assert sorted(numbers | unset) == sorted(RUN_RANGES.keys)


def test_data_parallelism_takes_the_ranks_that_are_left() -> None:
    assert data_parallel_size(compose_run_config([*GIVEN, *TP2_PP2]), 16) == 4

"""Contradictions in a drafter's settings are found before anything starts, all at once, each with a remedy."""

import copy
from functools import cache
from typing import Any

import pytest

from conf.composition.compose import compose_drafter_config
from conf.composition.trees import DRAFTER_TREE
from conf.rules.drafter import DRAFTER_RANGES, check_drafter_rules
from conf.rules.ranges import read_key
from conf.schema.drafter import DrafterConfig, DraftLoss, ResponseSource
from conf.system.errors import ConfigError


@cache
def default_config() -> DrafterConfig:
    return compose_drafter_config(["checkpoint=export", "data=chats.jsonl"])


def changed(values: dict[str, Any]) -> DrafterConfig:
    """Return the default configuration with some values replaced (composing anew would be slow)."""
    config = copy.deepcopy(default_config())
    for key, value in values.items():
        parent, _, name = key.rpartition(".")
        setattr(read_key(config, parent) if parent else config, name, value)
    return config


def violations(values: dict[str, Any], world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as caught:
        check_drafter_rules(changed(values), world_size)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
def test_the_defaults_work_on_any_world_size_that_divides_the_batch(world_size: int) -> None:
    check_drafter_rules(default_config(), world_size)


@pytest.mark.parametrize(
    ("values", "world_size", "named"),
    [
        ({"checkpoint": ""}, 1, ["checkpoint is empty"]),
        ({"output": ""}, 1, ["output is empty", "leave it out"]),
        ({"heldout": "./chats.jsonl"}, 1, ["data and heldout are both ./chats.jsonl", "heldout=null"]),
        ({"output": "export"}, 1, ["checkpoint and output are both export", "a folder of its own"]),
        ({"run.dir": "export/"}, 1, ["checkpoint and run.dir are both export/"]),
        ({"block_size": 1}, 1, ["block_size=1", "at least 2"]),
        ({"block_size": 0}, 1, ["block_size=0", "at least 2"]),
        ({"block_size": 4096}, 1, ["train.sequence_length=4096", "block_size=4096"]),
        ({"train.sequence_length": 64}, 1, ["train.blocks_per_sequence=64", "at most 63"]),
        (
            {"responses.source": ResponseSource.greedy, "responses.prompt_tokens": 4096},
            1,
            ["responses.prompt_tokens=4096", "train.sequence_length=4096"],
        ),
        ({"responses.source": ResponseSource.sampled, "responses.temperature": 0.0}, 1, ["responses.source=greedy"]),
        (
            {
                "objective.loss": DraftLoss.verified,
                "objective.verified.matching_weight": 0.0,
                "objective.verified.argmax_weight": 0.0,
            },
            1,
            ["objective.verified.matching_weight=0", "positive"],
        ),
        ({"zero.stage": 4}, 1, ["zero.stage=4", "0, 1, 2 or 3"]),
        ({"zero.stage": 0, "zero.offload_optimizer": True}, 1, ["zero.offload_optimizer", "zero.stage of 1 or more"]),
        ({"zero.offload_parameters": True}, 1, ["zero.offload_parameters", "zero.stage=3", "is 2"]),
        ({"schedule.final_lr": 1.0}, 1, ["schedule.final_lr=1", "schedule.peak_lr=0.001"]),
        ({}, 3, ["train.global_batch_size=64", "3 ranks", "=63"]),
        ({"train.micro_batch_size": 16}, 8, ["micro_batch_size=16 * 8 ranks", "global_batch_size=128"]),
    ],
)
def test_a_violated_rule_names_the_keys_the_values_and_a_remedy(
    values: dict[str, Any], world_size: int, named: list[str]
) -> None:
    message = violations(values, world_size)
    assert "\n" not in message
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    "values",
    [
        {"zero.stage": 3, "zero.offload_parameters": True, "zero.offload_optimizer": True},
        {"zero.stage": 1, "zero.offload_optimizer": True},
        {"train.sequence_length": 48, "train.blocks_per_sequence": 8, "block_size": 16},  # no prompt is cut from data
        {"responses.source": ResponseSource.greedy, "responses.temperature": 0.0},
        {"optimizer.clip_norm": 0.0, "checkpointing.every_steps": 0, "evaluation.every_steps": 0},
        {"heldout": "other.jsonl", "output": "export/linear_spec_lora", "run.dir": "export/run"},
        {"block_size": 2},
    ],
)
def test_what_can_work_is_not_refused(values: dict[str, Any]) -> None:
    check_drafter_rules(changed(values), 1)


def test_all_violations_are_listed_at_once() -> None:
    message = violations({"zero.stage": 5, "train.steps": 0, "train.micro_batch_size": 0, "block_size": 1}, 3)
    for part in ("4 settings", "zero.stage=5", "train.steps=0", "micro_batch_size=0", "block_size=1"):
        assert part in message


@pytest.mark.parametrize("key", DRAFTER_RANGES.keys)
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_every_number_is_refused_outside_its_range(key: str, value: float) -> None:
    assert f"{key}={value}" in violations({key: value})


@pytest.mark.parametrize("key", DRAFTER_RANGES.positive)
def test_zero_is_reported_and_never_divided_by(key: str) -> None:
    assert f"{key}=0" in violations({key: 0})


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_neither_all_nor_nothing_is_held_out(value: float) -> None:
    assert f"evaluation.share={value}" in violations({"evaluation.share": value})


def test_every_number_of_the_schema_has_a_range() -> None:
    values = {key: read_key(default_config(), key) for key in DRAFTER_TREE.keys}
    numbers = [key for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    assert sorted(numbers) == sorted(DRAFTER_RANGES.keys)

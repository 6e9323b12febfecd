"""Every setting that differs from the checkpoint's is named, and what it does to the learning rate."""

import json
from typing import Any

import pytest

from conf.composition.compose import compose_run_config
from pretrain.resume.config_changes import (
    ABSENT,
    ConfigChange,
    compare_configs,
    describe_changes,
    describe_learning_rate,
)
from pretrain.run.run_folder import plain
from tests.helpers.layouts import TP2

GIVEN = ["model=tiny", "train.tokens=1e6", "data.tokenizer=tokenizer", "run.name=run", "data.sequence_length=64"]
BLEND = "data.train={web: {path: tokens/web, weight: 0.7}, code: {path: tokens/code, weight: 0.3}}"


def resolved(*overrides: str) -> dict[str, Any]:
    return plain(compose_run_config([*GIVEN, BLEND, *overrides]))


def saved(*overrides: str) -> dict[str, Any]:
    """Return the configuration as it is read back from a checkpoint."""
    return json.loads(json.dumps(resolved(*overrides)))


def test_the_same_configuration_differs_in_nothing() -> None:
    assert compare_configs(saved(), resolved()) == ()
    assert compare_configs({}, resolved()) == (), "a checkpoint that knows no configuration"


def test_settings_are_named_with_both_values() -> None:
    changes = compare_configs(
        saved("schedule.peak_lr=1e-5"), resolved("schedule.peak_lr=2e-5", *TP2, "data.train.web.weight=0.5")
    )
    assert list(describe_changes(changes, 400)) == [
        "resume: 2 settings changed since step 400: data.train.web.weight 0.7 -> 0.5; schedule.peak_lr 1e-05 -> 2e-05",
        "resume: 1 setting changed about where and how it runs: parallel.tensor_parallel 1 -> 2",
    ]


def test_matmuls_in_8_bits_change_what_is_learned_and_overlap_does_not() -> None:
    changes = compare_configs(saved(), resolved("precision.fp8=tensorwise", "parallel.offload_layers=1"))
    assert list(describe_changes(changes, 3)) == [
        "resume: 1 setting changed since step 3: precision.fp8 null -> tensorwise",
        "resume: 1 setting changed about where and how it runs: parallel.offload_layers 0 -> 1",
    ]


def test_sources_come_and_go_with_all_their_keys() -> None:
    one = "data.train={web: {path: tokens/web, weight: 0.7}}"
    changes = compare_configs(saved(), plain(compose_run_config([*GIVEN, one])))
    assert ConfigChange("data.train.code.weight", 0.3, ABSENT) in changes
    assert {change.key for change in changes} == {"data.train.code.weight", "data.train.code.path"}
    assert str(ConfigChange("data.train.code.weight", ABSENT, 0.3)) == "data.train.code.weight (absent) -> 0.3"


@pytest.mark.parametrize(
    ("key", "is_about_training"),
    [
        ("schedule.peak_lr", True),
        ("train.global_batch_size", True),
        ("data.train.web.weight", True),
        ("data.sequence_length", True),
        ("guard.spike_policy", True),
        ("precision.dtype", True),
        ("stage.diffusion_weight", True),
        ("model.init_std", True),
        ("data.train.web.path", False),
        ("data.train.web.input", False),
        ("data.train.web.input.files", False),
        ("data.tokenizer", False),
        ("run.root", False),
        ("runtime.wandb_project", False),
        ("parallel.pipeline_parallel", False),
        ("checkpoint.every_steps", False),
        ("evaluation.sequences", False),
        ("resume.allow_data_change", False),
    ],
)
def test_what_is_learned_is_distinguished_from_where_it_runs(key: str, is_about_training: bool) -> None:
    assert ConfigChange(key, 1, 2).is_about_training is is_about_training


def test_a_changed_schedule_or_budget_says_the_next_learning_rate() -> None:
    tokens = 500_000
    then = saved("schedule.peak_lr=1e-5", "schedule.final_lr=1e-6")
    same = "schedule.peak_lr=1e-5", "schedule.final_lr=1e-6"
    assert list(describe_learning_rate(then, resolved(*same, "runtime.log_every_steps=7"), tokens)) == []
    (line,) = describe_learning_rate(then, resolved("schedule.peak_lr=2e-5", "schedule.final_lr=1e-6"), tokens)
    assert line == "resume: the learning rate of the next step is 2e-05, it would have been 1e-05"
    (line,) = describe_learning_rate(then, resolved(*same, "train.tokens=5e5"), tokens)
    assert "next step is 1e-06" in line, "the whole budget is spent"
    assert list(describe_learning_rate({}, resolved(), tokens)) == []

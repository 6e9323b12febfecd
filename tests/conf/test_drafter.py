"""The drafter's configuration: composed as strictly as a run's, from a tree of its own."""

import re

import pytest
from omegaconf import OmegaConf

from conf.composition.compose import compose_drafter_config, compose_groups
from conf.composition.help import describe_option, help_text, meanings
from conf.composition.trees import DRAFTER_TREE, RUN_TREE, ConfigTree
from conf.rules.drafter import check_drafter_rules
from conf.schema import Dtype, OptimizerConfig, ResumeMode, ScheduleConfig, ScheduleKind
from conf.schema.drafter import DrafterConfig, DraftLoss, PositionWeights, ResponseSource
from conf.system.errors import ConfigError

GIVEN = ["checkpoint=export", "data=chats.jsonl"]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_drafter_config([*GIVEN, *overrides])
    return str(caught.value)


def test_without_overrides_every_value_is_the_schemas_or_that_of_a_groups_option() -> None:
    composed = compose_drafter_config(GIVEN)
    values = {
        group: OmegaConf.load(DRAFTER_TREE.folder / group / f"{option}.yaml")
        for group, option in (("optimizer", "adamw"), ("schedule", "cosine"))
    }
    given = {"checkpoint": "export", "data": "chats.jsonl", **values}
    assert composed == OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DrafterConfig), given))


def test_the_published_shape_is_the_default() -> None:
    config = compose_drafter_config(GIVEN)
    assert (config.adapter.rank, config.adapter.alpha) == (128, 512.0)
    assert config.runtime.dtype is Dtype.bf16
    assert config.run.dir == "runs/drafter"


def test_optimizer_and_schedule_are_settings_with_the_values_of_before() -> None:
    config = compose_drafter_config(GIVEN)
    optimizer = OptimizerConfig(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0, clip_norm=1.0)
    assert config.optimizer == optimizer
    assert config.schedule == ScheduleConfig(ScheduleKind.cosine, 1e-3, 1e-5, warmup_fraction=0.03)
    changed = compose_drafter_config([*GIVEN, "optimizer.beta2=0.99", "schedule.kind=wsd"])
    assert (changed.optimizer.beta2, changed.schedule.kind) == (0.99, ScheduleKind.wsd)


def test_an_option_of_a_group_has_the_last_word_over_its_default_and_a_key_over_the_option() -> None:
    config = compose_drafter_config([*GIVEN, "schedule=wsd", "schedule.peak_lr=3e-4", "optimizer=adamw_decay"])
    assert config.schedule == ScheduleConfig(ScheduleKind.wsd, 3e-4, 0.0, warmup_fraction=0.03, decay_fraction=0.2)
    assert config.optimizer == OptimizerConfig(weight_decay=0.1)
    experiment = compose_drafter_config(["experiment=quickstart", "schedule=wsd"])
    assert (experiment.schedule.kind, experiment.schedule.peak_lr) == (ScheduleKind.wsd, 3e-3)


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group in DRAFTER_TREE.groups for option in DRAFTER_TREE.options(group)]
)
def test_every_option_says_what_it_is_and_obeys_the_rules(group: str, option: str) -> None:
    check_drafter_rules(compose_drafter_config([*GIVEN, f"{group}={option}"]), world_size=2)
    assert describe_option(DRAFTER_TREE, group, option).endswith(".")


def test_the_command_line_reaches_enums_and_open_values() -> None:
    config = compose_drafter_config(
        [
            *GIVEN,
            *("resume=never", "responses.source=sampled", "objective.loss=hybrid", "objective.position_weights=none"),
            *("block_size=16", "run.name=mine"),
        ]
    )
    assert (config.resume, config.responses.source) == (ResumeMode.never, ResponseSource.sampled)
    assert (config.objective.loss, config.objective.position_weights) == (DraftLoss.hybrid, PositionWeights.none)
    assert (config.block_size, config.run.dir) == (16, "runs/mine")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("checkpont=x", "unknown key 'checkpont'; did you mean 'checkpoint'?"),
        ("train.setps=1", "did you mean 'train.steps'?"),
        ("rank=64", "did you mean 'adapter.rank'?"),
        ("stage=3", "did you mean 'zero.stage'?"),
        ("experment=quickstart", "did you mean 'experiment'?"),
        ("experiment=quickstrat", "did you mean experiment=quickstart?"),
        ("+zero.stge=1", "did you mean 'zero.stage'?"),
        ("+model=tiny", "unknown key 'model'"),
        ("+x=1", "unknown key 'x'; see --help"),
        ("schedule=cosin", "did you mean schedule=cosine?"),
        ("objective.verified.positions=some", "expected one of [active, all]"),
        ("objective.loss=mse", "objective.loss: Invalid value 'mse', expected one of [argmax, data, kl"),
        ("train.steps=many", "train.steps: "),
        ("data.train.web.path=x", "data: "),
        ("adapter", "key=value"),
    ],
)
def test_a_mistake_is_named_with_the_nearest_valid_spelling(override: str, named: str) -> None:
    message = refusal(override)
    assert named in message and "\n" not in message


def test_everything_missing_is_listed_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"give: checkpoint=\.\.\. data=\.\.\.$"):
        compose_drafter_config([])


def test_the_quickstart_needs_nothing_but_its_name() -> None:
    config = compose_drafter_config(["experiment=quickstart", "run.root=elsewhere"])
    assert config.checkpoint == "elsewhere/quickstart/export"
    assert config.run.dir == "elsewhere/quickstart/drafter"


def test_the_two_trees_do_not_see_each_other() -> None:
    assert DRAFTER_TREE.groups == ["experiment", "optimizer", "schedule"]
    assert "drafter" not in RUN_TREE.groups and "schema" not in RUN_TREE.groups
    with pytest.raises(ConfigError, match="unknown key 'drafter'"):
        compose_groups(["drafter=config"])


@pytest.mark.parametrize("tree", [RUN_TREE, DRAFTER_TREE], ids=lambda tree: tree.module)
def test_help_gives_every_group_option_key_and_choice(tree: ConfigTree) -> None:
    text = help_text(tree, "the usage", [])
    assert text.startswith("the usage\n")
    assert all(f"\n    {option} " in text for group in tree.groups for option in tree.options(group))
    unset = re.compile(r"<|\.input|model\.vision\.")  # below a name of the user's, or below what is null
    assert all(f" {key.rpartition('.')[2]}:" in text for key in tree.keys if not unset.search(key))
    assert max(len(line) for line in text.partition("\nkeys ")[2].splitlines()) <= 120


def test_help_shows_values_under_the_overrides() -> None:
    text = help_text(DRAFTER_TREE, "", ["adapter.rank=8", "experiment=quickstart"])
    assert "    rank: 8 " in text and "  checkpoint: ${run.root}/quickstart/export # directory" in text


def test_every_key_of_the_drafter_has_a_meaning() -> None:
    known = meanings(DRAFTER_TREE)
    assert list(known) == DRAFTER_TREE.keys
    assert [key for key, meaning in known.items() if not meaning] == []


def test_meanings_are_those_of_the_docstrings() -> None:
    known = meanings(DRAFTER_TREE)
    assert known["train.steps"] == "optimizer steps."
    assert known["adapter"] == "LoRA on every o_proj."
    assert known["schedule.peak_lr"] == known["schedule.final_lr"]
    assert "never: refuse a used folder." in known["resume"]
    assert known["objective.position_weights"].startswith("none: every drafted position counts alike.")
    assert meanings(RUN_TREE)["data.train.<source>.path"]

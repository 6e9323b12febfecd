"""Old names of keys, values and options are refused with today's name, and read in files of earlier versions."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.composition.compose import compose_data, compose_drafter_config, compose_run_config, load_run_config
from conf.composition.explain import explain, explain_unknown_keys
from conf.composition.renamed import RenamedNames
from conf.composition.trees import DRAFTER_TREE, RUN_TREE, ConfigTree
from conf.schema.drafter import DrafterConfig
from conf.system.errors import ConfigError

GIVEN = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer", "train.tokens=1e6"]
NAMES = RenamedNames(
    keys={"old": "new.name", "group": "team", "data.train.<source>.input.lines": "data.train.<source>.input.records"},
    values={"team.mode": {"slow": "careful"}, "data.train.<source>.kind": {"prose": "text"}},
    options={"team": {"both": "team.a=1 team.b=2"}},
)
TREES = [RUN_TREE, DRAFTER_TREE]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("old", "new.name"),
        ("group.mode.x", "team.mode.x"),
        ("data.train.web-1.input.lines", "data.train.web-1.input.records"),
        ("data.train.web.input", "data.train.web.input"),
        ("older", "older"),
    ],
)
def test_a_key_has_its_name_of_today(old: str, new: str) -> None:
    assert NAMES.current_key(old) == new


def test_a_configuration_of_an_earlier_version_is_read_under_todays_names() -> None:
    old = {
        "old": [1, 2],
        "group": {"mode": "slow", "rest": {}},
        "data": {"train": {"web": {"input": {"lines": None}, "kind": "prose"}, "mine": {"path": "a"}}},
    }
    assert NAMES.read_old(old) == {
        "new": {"name": [1, 2]},
        "team": {"mode": "careful", "rest": {}},
        "data": {"train": {"web": {"input": {"records": None}, "kind": "text"}, "mine": {"path": "a"}}},
    }


@pytest.mark.parametrize("override", ["data.completion_loss=false", "++data.completion_loss=false"])
def test_an_old_key_on_the_command_line_is_refused_with_the_new_one(override: str) -> None:
    with pytest.raises(
        ConfigError, match=r"'data\.completion_loss' has been renamed; give 'data\.block_padding_loss'$"
    ):
        compose_run_config([*GIVEN, override])


def test_an_old_key_in_a_file_is_refused_with_file_and_new_key(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("train: a\ntokenizer: t\ncompletion_loss: true\n")
    with pytest.raises(ConfigError, match=r"data/mine\.yaml: .*'data\.block_padding_loss'$"):
        compose_data(["data=mine"], tmp_path)


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.module)
def test_every_old_key_is_gone_and_every_new_one_exists(tree: ConfigTree) -> None:
    names = tree.renamed
    assert not names.keys.keys() & set(tree.keys)
    assert {*names.keys.values(), *names.values} <= set(tree.keys)
    for group, options in names.options.items():
        assert not options.keys() & set(tree.options(group))


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.module)
def test_every_old_key_is_refused_with_the_new_one(tree: ConfigTree) -> None:
    for old, new in tree.renamed.keys.items():
        message = refusal(tree, f"+{old.replace('<source>', 'web')}=1")
        assert f"give {new.replace('<source>', 'web')!r}" in message


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.module)
def test_every_old_value_is_refused_with_the_new_one(tree: ConfigTree) -> None:
    for key, values in tree.renamed.values.items():
        for old, new in values.items():
            assert f"give {key}={new}" in refusal(tree, f"{key}={old}")


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.module)
def test_every_old_option_is_refused_with_overrides_that_work(tree: ConfigTree) -> None:
    for group, options in tree.renamed.options.items():
        for old, instead in options.items():
            assert instead in refusal(tree, f"{group}={old}")
            compose(tree, *instead.split())


def test_a_source_keeps_its_name_in_the_message() -> None:
    tree = replace(RUN_TREE, renamed=NAMES)
    error = explain_unknown_keys(["data.train.web.input.lines", "data.train.web.input.x"], tree)
    assert "'data.train.web.input.records'; unknown key 'data.train.web.input.x'" in str(error)


def test_an_old_value_in_a_file_is_refused_with_file_and_new_value() -> None:
    tree = replace(DRAFTER_TREE, renamed=RenamedNames(values={"runtime.device": {"gpu": "cuda"}}))
    raised = (
        "In 'experiment/mine': ValidationError raised while composing config:\n"
        "Invalid value 'gpu', expected one of [auto, cpu, cuda]\n    full_key: runtime.device\n    object_type=X"
    )
    expected = "experiment/mine.yaml: runtime.device=gpu has been renamed; give runtime.device=cuda"
    assert str(explain(ValueError(raised), tree)) == expected


def test_a_run_folder_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    config = compose_run_config([*GIVEN, "data.block_padding_loss=false"])
    text = OmegaConf.to_yaml(OmegaConf.structured(config)).replace("block_padding_loss", "completion_loss")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert load_run_config(tmp_path / "config.yaml") == config


def compose(tree: ConfigTree, *overrides: str) -> object:
    if tree.schema is DrafterConfig:
        return compose_drafter_config(["checkpoint=export", "data=chats.jsonl", *overrides])
    return compose_run_config([*GIVEN[1:], "data.train={web: {path: a}}", *overrides])


def refusal(tree: ConfigTree, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(tree, *overrides)
    return str(caught.value)

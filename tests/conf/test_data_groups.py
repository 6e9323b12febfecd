"""Options of the group `data`: they compose, refuse what is left open by name, and say where NVIDIA's sets are from."""

import re
from pathlib import Path

import pytest

from conf.composition.compose import compose_data
from conf.composition.trees import RUN_TREE
from conf.schema.data import DataConfig, DocumentKind, InputConfig, Split
from conf.system.errors import ConfigError
from tests.helpers.data_options import PLACE, complete_data, open_weights

COMPLETE = {"quickstart", "quickstart_chats", "medium"}  # they leave nothing open
NEMOTRON = ["nemotron_pretraining", "nemotron_post_training"]


def compose_complete(option: str) -> DataConfig:
    return compose_data(complete_data(option))


def inputs(config: DataConfig) -> dict[str, InputConfig]:
    return {name: source.input for name, source in config.train.items()}


@pytest.mark.parametrize("option", RUN_TREE.options("data"))
def test_every_option_composes_when_its_open_values_are_given(option: str) -> None:
    config = compose_complete(option)
    paths = [source.path for blend in (config.train, config.heldout or {}) for source in blend.values()]
    assert len(set(paths)) == len(paths) >= 1
    assert not any("None" in path or "???" in path for path in paths)


@pytest.mark.parametrize("option", [option for option in RUN_TREE.options("data") if option not in COMPLETE])
def test_an_open_value_is_refused_by_its_name(option: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer|data\.train\.text\.input\.files"):
        compose_data([f"data={option}"])


def test_an_open_weight_is_refused_by_its_name() -> None:
    keys = open_weights("nemotron_post_training")
    assert keys
    with pytest.raises(ConfigError, match=re.escape(keys[0])):
        compose_data(["data=nemotron_post_training", *PLACE])


@pytest.mark.parametrize("option", NEMOTRON)
def test_a_source_can_be_left_out_on_the_command_line(option: str) -> None:
    name = next(iter(compose_complete(option).train))
    given = [override for override in complete_data(option) if f".{name}." not in override]
    assert name not in compose_data([*given, f"~data.train.{name}"]).train


@pytest.mark.parametrize("option", NEMOTRON)
def test_nemotron_sources_name_dataset_column_and_licence(option: str) -> None:
    kind = {"nemotron_pretraining": DocumentKind.text, "nemotron_post_training": DocumentKind.chat}[option]
    for name, read in inputs(compose_complete(option)).items():
        assert re.fullmatch(r"nvidia/(Llama-)?Nemotron-[\w.-]+", read.dataset or ""), name
        assert read.licence and read.column and read.files is None, name
        assert (read.kind, read.records) == (kind, Split.train), name


@pytest.mark.parametrize("option", NEMOTRON)
def test_nemotron_sources_are_listed_once_and_without_metadata(option: str) -> None:
    read = [(one.dataset, one.subset, one.split) for one in inputs(compose_complete(option)).values()]
    assert len(set(read)) == len(read)
    assert not any("Metadata" in (subset or "") for _, subset, _ in read)


@pytest.mark.parametrize("option", [*NEMOTRON, "text"])
def test_held_out_records_are_those_that_training_leaves(option: str) -> None:
    config = compose_complete(option)
    assert config.heldout
    for name, source in config.heldout.items():
        train, held = config.train[name].input, source.input
        assert (train.records, held.records) == (Split.train, Split.heldout)
        assert {**vars(train), "records": None} == {**vars(held), "records": None}, name


@pytest.mark.parametrize("option", NEMOTRON)
def test_every_nemotron_weight_says_where_it_is_from(option: str) -> None:
    text = Path(RUN_TREE.folder, "data", f"{option}.yaml").read_text(encoding="utf-8").partition("\nheldout:")[0]
    weights = re.findall(r"^    weight: (.*)$", text, re.MULTILINE)
    assert len(weights) == len(compose_complete(option).train)
    assert all("  # " in weight for weight in weights)

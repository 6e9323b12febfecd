"""data.train and data.heldout: a path or a blend, checked like everything else."""

import pytest
import yaml

from conf.composition.compose import compose_data, compose_run_config, load_run_config
from conf.rules.run import check_rules
from conf.schema import DocumentKind, RunConfig, SourceConfig, Split
from conf.system.errors import ConfigError
from pretrain.run.run_folder import plain

GIVEN = ["data.tokenizer=corpus/tokenizer", "train.tokens=1e6"]


def compose_blend(blend: str, *overrides: str) -> RunConfig:
    config = compose_run_config([*GIVEN, f"data.train={blend}", *overrides])
    check_rules(config, world_size=1)
    return config


def test_a_path_is_a_blend_of_one() -> None:
    config = compose_blend("corpus/train")
    assert config.data.train == {"train": SourceConfig(path="corpus/train")}
    assert config.data.heldout == {}


def test_a_run_can_be_composed_again_whatever_its_data_are_called(tmp_path) -> None:
    config = compose_blend("tokens/web.v1")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    assert load_run_config(tmp_path / "config.yaml").data == config.data


def test_a_blend_has_typed_sources() -> None:
    data = compose_blend(
        "{web: {path: a, weight: 2}, chats: {path: b, weight: 1, input: {kind: chat, files: c.jsonl}}}"
    ).data
    assert data.train["web"] == SourceConfig(path="a", weight=2.0)
    assert data.train["chats"].input.kind is DocumentKind.chat
    assert data.train["chats"].input.records is Split.all


def test_one_source_of_a_group_can_be_overridden() -> None:
    assert compose_blend("{web: {path: a, weight: 2}}", "data.train.web.weight=3").data.train["web"].weight == 3.0


@pytest.mark.parametrize(
    ("blend", "parts"),
    [
        ("{web: {path: a, wieght: 2}}", ["data.train.web.wieght", "data.train.<source>.weight"]),
        ("{web: {path: a, input: {file: x}}}", ["data.train.web.input.file", "files"]),
        ("{web: {path: a, weight: heavy}}", ["data.train.web", "heavy"]),
        ("{web: {path: a, input: {kind: video}}}", ["data.train.web.input.kind", "video"]),
        ("{web: {path: ???}}", ["data.train.web.path"]),
        ("{web: 3}", ["data.train.web=3"]),
        ("{web.v1: {path: a}}", ["'web.v1' cannot name a source"]),
        ("{web: {path: a, weight: 1, tokens: 1e6}}", ["data.train.web has both"]),
        ("{web: {path: a, weight: 1}, code: {path: ./a, weight: 1}}", ["more than once", "web, code"]),
        ("{web: {path: a}, code: {path: b, weight: 1}}", ["web, code", "each of them a weight"]),
        ("{web: {path: a, weight: 1}, code: {path: b, tokens: 1e6}}", ["weight: web", "tokens: code"]),
        ("{web: {path: a, weight: 1}, code: {path: a, weight: 1}}", ["more than once", "web, code"]),
        ("{web: {path: a, weight: 0}}", ["data.train.web.weight=0"]),
        ("{web: {path: a, tokens: 4e5}, code: {path: b, tokens: 5e5}}", ["900000", "train.tokens=1e+06"]),
    ],
)
def test_a_wrong_blend_is_one_message(blend: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_blend(blend)
    for part in parts:
        assert part in str(caught.value)


def test_a_source_may_be_given_keys_its_yaml_does_not_name(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("train: {web: {path: a}}\ntokenizer: t\n")
    data = compose_data(["data=mine", "data.train.web.tokens=1e6", "data.train.web.input.files=x"], tmp_path)
    assert (data.train["web"].tokens, data.train["web"].input.files) == (1e6, "x")
    with pytest.raises(ConfigError, match=r"data\.train\.wbe\.path"):
        compose_run_config([*GIVEN, "data.train={web: {path: a}}", "data.train.wbe.tokens=3"])


def test_a_yaml_error_is_one_message_with_its_place(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("tokenizer: t\ntrain: {web: {path: ???, weight: 1}}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml, line 2, column \d+ is not YAML") as caught:
        compose_data(["data=mine"], tmp_path)
    assert "\n" not in str(caught.value)


def test_data_compose_without_a_run(tmp_path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "mine.yaml").write_text("train: {web: {path: '${run.root}/web'}}\ntokenizer: t\n")
    data = compose_data(["data=mine", "run.root=elsewhere"], tmp_path)
    assert data.train["web"].path == "elsewhere/web"
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        compose_data(["data.train=a"])

"""What is typed for a setting that is text stays as it was typed."""

import pytest

from conf.composition.compose import compose_drafter_config, compose_run_config
from conf.composition.text_settings import keep_text
from conf.composition.trees import DRAFTER_TREE, RUN_TREE

GIVEN = ["data.train=corpus/train", "data.tokenizer=corpus/tokenizer", "train.tokens=300e9"]


@pytest.mark.parametrize(
    "text", ["83e2010", "1e3", "007", "1_000", "3.10", "true", "nan", "inf", "-1", "0x1f", "plain", "a b"]
)
def test_text_stays_text_in_every_setting_that_is_text(text: str) -> None:
    config = compose_run_config([*GIVEN, f"run.name={text}", f"data.mask_token={text}", f"init_from={text}"])
    assert (config.run.name, config.data.mask_token, config.init_from) == (text, text, text)


@pytest.mark.parametrize("text", ["2024_11", "83e2010"])
def test_paths_of_sources_are_text(text: str) -> None:
    config = compose_run_config([*GIVEN[1:], f"data.train.web.path={text}", "data.train.web.weight=1e0"])
    assert config.data.train["web"].path == text
    assert config.data.train["web"].weight == 1.0
    alone = compose_run_config([f"data.train={text}", *GIVEN[1:]])
    assert [source.path for source in alone.data.train.values()] == [text]


def test_text_of_the_drafter_too() -> None:
    assert compose_drafter_config(["checkpoint=83e2010", "data=1e3"]).checkpoint == "83e2010"


def test_numbers_null_and_quoted_text_are_as_before() -> None:
    unchanged = ["train.tokens=1e3", "run.name=null", "run.name='83e2010'", "run.name=${model.name}", "stage=joint"]
    unchanged += ["~data.heldout.text", "run.name=", "train.seed=5", "run.name=[1e3]"]
    assert keep_text(unchanged, RUN_TREE) == unchanged
    assert keep_text(["++run.name=1e3"], RUN_TREE) == ["++run.name='1e3'"]
    assert keep_text(["train.steps=1e3"], DRAFTER_TREE) == ["train.steps=1e3"]

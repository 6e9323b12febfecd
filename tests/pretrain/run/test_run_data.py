"""The data of a run is opened and checked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conf.composition.compose import compose_run_config
from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, RunConfig, SourceConfig, Split
from conf.system.errors import UserError
from data_pipeline.chat.template import CHATML_PATH
from data_pipeline.prepare.run import prepare_source
from data_pipeline.storage.manifest import manifest_path
from pretrain.run.run_data import copy_tokenizer, describe_blend, describe_overlap, open_data
from tests.helpers.toy_data import ToyData, tokens_of


def compose(data: ToyData, root: Path, *extra: str, chats: bool = True) -> RunConfig:
    stage = "sft" if chats else "joint"
    where = [f"run.root={root}", "run.name=run", f"stage={stage}"]
    return compose_run_config([*data.overrides(chats), tokens_of(4, chats), *where, *extra])


def test_instruct_tuning_refuses_texts(toy_data: ToyData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds texts, and stage"):
        open_data(compose(toy_data, tmp_path, f"data.train={toy_data.train}"))


def test_instruct_tuning_refuses_two_templates(toy_data: ToyData, tmp_path: Path) -> None:
    other = Path(shutil.copytree(toy_data.heldout_chats, tmp_path / "other"))
    values = json.loads(manifest_path(other).read_text())
    values["settings"]["encoder"]["chat_template"] += " "
    manifest_path(other).write_text(json.dumps(values))
    with pytest.raises(UserError, match="different chat templates"):
        open_data(compose(toy_data, tmp_path, f"data.heldout={other}"))


def test_a_run_on_chats_keeps_an_instruct_tokenizer(toy_data: ToyData, tmp_path: Path) -> None:
    config = compose(toy_data, tmp_path)
    data = open_data(config)
    copy_tokenizer(config, data)
    folder = tmp_path / "run" / "tokenizer"
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert (folder / "chat_template.jinja").read_text() == CHATML_PATH.read_text()
    stamp = (folder / "tokenizer_config.json").stat().st_mtime_ns
    copy_tokenizer(config, data)
    assert (folder / "tokenizer_config.json").stat().st_mtime_ns == stamp, "a second start finds it as it must be"
    assert data.chat is not None
    copy_tokenizer(config, replace(data, chat=replace(data.chat, template="another")))
    assert (folder / "chat_template.jinja").read_text() == "another", "other chats, another template"


def test_all_files_that_name_the_end_of_sequence_name_the_end_of_a_turn(toy_data: ToyData, tmp_path: Path) -> None:
    """Transformers goes by special_tokens_map.json where there is one."""
    config = compose(toy_data, tmp_path)
    own = Path(shutil.copytree(config.data.tokenizer, tmp_path / "own"))
    (own / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    config.data.tokenizer = str(own)
    copy_tokenizer(config, open_data(config))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "<|im_end|>")


def test_a_run_on_texts_keeps_the_tokenizer_as_it_is(toy_data: ToyData, tmp_path: Path) -> None:
    config = compose(toy_data, tmp_path, chats=False)
    copy_tokenizer(config, open_data(config))
    folder = tmp_path / "run" / "tokenizer"
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert not (folder / "chat_template.jinja").exists()


def test_a_run_says_what_every_source_gives_it(toy_data: ToyData, tmp_path: Path) -> None:
    blend = (
        f"{{big: {{path: {toy_data.train_chats}, weight: 3}}, small: {{path: {toy_data.heldout_chats}, weight: 1}}}}"
    )
    data = open_data(compose(toy_data, tmp_path, f"data.train={blend}", "data.sequence_length=64"))
    lines = {line.partition(":")[0]: line for line in describe_blend(data.train, num_samples=1000)}
    assert set(lines) == {"big", "small"}
    small = data.train.sources["small"].num_sequences
    assert "25.0% of the run" in lines["small"] and f"{250 / small:.3g} epochs" in lines["small"]
    assert "chats truncated by" in lines["small"] and "dropped with" in lines["small"]


def test_held_out_data_that_are_trained_on_are_pointed_out(toy_data: ToyData, tmp_path: Path) -> None:
    assert not list(describe_overlap(open_data(compose(toy_data, tmp_path))))
    same = replace(toy_data, heldout_chats=toy_data.train_chats)
    [line] = describe_overlap(open_data(compose(same, tmp_path)))
    assert "they are not held out" in line


def test_records_held_out_with_another_distance_are_pointed_out(toy_data: ToyData, tmp_path: Path) -> None:
    def prepare(name: str, split: Split, every: int) -> Path:
        file = toy_data.train_chats.with_suffix(".jsonl")
        source = SourceConfig(path=str(tmp_path / name), input=InputConfig(DocumentKind.chat, str(file), records=split))
        settings = PrepareConfig(workers=1, chat_template="chatml", heldout_every=every)
        prepare_source(name, source, DataConfig(tokenizer=str(toy_data.tokenizer), prepare=settings))
        return tmp_path / name

    train, heldout = prepare("train", Split.train, 10), prepare("heldout", Split.heldout, 10)
    assert not list(describe_overlap(open_data(compose(toy_data, tmp_path, *data_of(train, heldout)))))
    other = prepare("other", Split.heldout, 5)
    [line] = describe_overlap(open_data(compose(toy_data, tmp_path, *data_of(train, other))))
    assert "they are not held out" in line


def data_of(train: Path, heldout: Path) -> list[str]:
    return [f"data.train={train}", f"data.heldout={heldout}"]

"""The command itself, called in this process."""

import os
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.inspect.__main__ import main
from data_pipeline.prepare.run import prepare_source
from data_pipeline.toy.corpus import load_docstring_chats, write_jsonl
from data_pipeline.toy.pictures import load_picture_questions, write_parquet
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer
from tests.helpers.stored import random_chats, random_texts, write_dataset, write_pair


@pytest.fixture
def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs the command and returns exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["inspect", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        status = 0
        try:
            main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def chats_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_jsonl(load_docstring_chats().heldout[:60], folder / "chats.jsonl")
    input_ = InputConfig(kind=DocumentKind.chat, files=str(folder / "chats.jsonl"), licence="PSF-2.0")
    prepare = PrepareConfig(workers=1, chat_template="chatml")
    source = SourceConfig(path=str(folder / "tokens"), input=input_)
    prepare_source("chats", source, DataConfig(tokenizer=str(tokenizer_dir), prepare=prepare))
    return folder / "tokens"


def test_chats_are_shown_with_everything(inspect, chats_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    picture = tmp_path / "lengths.png"
    options = ("--sequence-length", 1024, "--samples", 2, "--tokens", "--verify", "--histogram", picture)
    status, out, err = inspect(chats_dir, "--tokenizer", tokenizer_dir, *options)
    assert status == 0, err
    for part in ("chat", "60", "licence: PSF-2.0", "verified: 1 shards", "never occur", "response", "sample 1:"):
        assert part in out
    assert "━━ document 0, positions 0-" in out and "── response" in out and "⟦" in out and "<|im_end|>" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= max(80, len(f"histogram of lengths: {picture}"))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_seed_and_stage_decide_the_noise(inspect, own_dataset_dir: Path, tokenizer_dir: Path) -> None:
    shown = [
        inspect(own_dataset_dir, "--tokenizer", tokenizer_dir, "--sequence-length", 256, "--samples", 1, *options)[1]
        for options in ((), (), ("--stage", "sft"), ("--seed", 1), ("--ar",))
    ]
    assert shown[0] == shown[1]
    assert len(set(shown)) == 4
    assert "⟦" not in shown[4] and "t=" not in shown[4]


def test_without_a_tokenizer_ids_are_shown_and_it_says_so(inspect, tmp_path: Path) -> None:
    write_pair(tmp_path / "pair", random_texts(9, 50))
    status, out, err = inspect(tmp_path / "pair", "--samples", 1, "--ar", "--tokens", "--sequence-length", 32)
    assert status == 0, err
    assert "no --tokenizer: token ids instead of text" in out and "no manifest" in out


def test_a_terminal_gets_colours_unless_it_asks_for_none(
    inspect, own_dataset_dir: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    arguments = (own_dataset_dir, "--tokenizer", tokenizer_dir, "--samples", 1)
    assert "\x1b[7;31m" in inspect(*arguments)[1]
    assert "\x1b" not in inspect(*arguments, "--plain")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    out = inspect(*arguments)[1]
    assert "\x1b" not in out and "⟦" in out


def assert_error(result: tuple[int, str, str], message: str) -> None:
    status, _, err = result
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_bad_inputs_are_one_line_and_status_2(
    inspect, own_dataset_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    assert_error(inspect(tmp_path / "missing"), "missing holds no data")
    (tmp_path / "empty").mkdir()
    assert_error(inspect(tmp_path / "empty"), "manifest.json does not exist")
    write_dataset(tmp_path / "nothing", [])
    assert_error(inspect(tmp_path / "nothing"), "lists no documents")
    assert_error(inspect(own_dataset_dir, "--tokenizer", tmp_path / "no"), "does not exist")
    assert_error(inspect(own_dataset_dir, "--tokenizer", tokenizer_dir, "--mask-token", "<M>"), "no mask token '<M>'")
    assert_error(inspect(own_dataset_dir, "--sequence-length", 100), "not a multiple of block_size")
    write_dataset(tmp_path / "chats", [random_chats(2, 900)], kind="chat")
    assert_error(inspect(tmp_path / "chats", "--sequence-length", 32), "no chat")
    assert_error(inspect(own_dataset_dir, "--histogram", own_dataset_dir), "cannot be written")


def test_another_tokenizer_is_refused(inspect, own_dataset_dir: Path, texts: list[str], tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(texts, vocab_size=365), tmp_path / "other")
    assert_error(inspect(own_dataset_dir, "--tokenizer", tmp_path / "other"), "give the tokenizer that made the data")


def test_verify_finds_a_changed_shard_and_needs_a_manifest(inspect, own_dataset_dir: Path, tmp_path: Path) -> None:
    shard = sorted(own_dataset_dir.glob("*.bin"))[1]
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    shard.write_bytes(b"\x00\x00" + shard.read_bytes()[2:])
    os.utime(shard, ns=times)
    status, _, err = inspect(own_dataset_dir, "--verify", "--samples", 0)
    assert status == 2 and f"error: {shard} is not what" in err
    write_pair(tmp_path / "pair", random_texts(9, 50))
    assert_error(inspect(tmp_path / "pair", "--verify"), "no manifest and so no checksums")


@pytest.mark.parametrize("option", [("--samples", "-1"), ("--block-size", "0"), ("--overlong", "keep")])
def test_values_out_of_range_are_refused(inspect, dataset_dir: Path, option: tuple[str, str]) -> None:
    status, _, err = inspect(dataset_dir, *option)
    assert status == 2 and option[0] in err


def test_the_old_name_of_an_option_is_refused_with_the_new_one(inspect, own_dataset_dir: Path) -> None:
    status, _, err = inspect(own_dataset_dir, "--rows", 0)
    assert status == 2 and "renamed: give --positions 0" in err


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory: pytest.TempPathFactory, image_tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_parquet(load_picture_questions(40, 0).train, folder / "questions.parquet")
    input_ = InputConfig(DocumentKind.image_chat, str(folder / "questions.parquet"), column="texts")
    data = DataConfig(tokenizer=str(image_tokenizer_dir), prepare=PrepareConfig(workers=1, chat_template="chatml"))
    prepare_source("images", SourceConfig(path=str(folder / "tokens"), input=input_), data)
    return folder / "tokens"


def test_chats_with_images_are_shown_with_a_sheet(
    inspect, images_dir: Path, image_tokenizer_dir: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "sheet.png"
    options = ("--sequence-length", 256, "--samples", 3, "--positions", 0, "--verify", "--images", sheet)
    status, out, err = inspect(images_dir, "--tokenizer", image_tokenizer_dir, *options)
    assert status == 0, err
    for part in ("image_chat", "40 in prompts", "image tokens", "images in them", "fixed images", "── response"):
        assert part in out
    assert re.search(r"<\|im_start\|>user↵\n\[image \d x \d\]", out)
    assert "image_pad" not in out
    with Image.open(sheet) as drawn:
        assert drawn.format == "PNG" and drawn.width > 1000 and drawn.height > 250


def test_a_sheet_without_images_is_refused(inspect, chats_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    options = ("--tokenizer", tokenizer_dir, "--sequence-length", 1024, "--images", tmp_path / "sheet.png")
    status, _, err = inspect(chats_dir, *options)
    assert status == 2 and "samples 0 to 2 of" in err and "hold no image" in err
    assert not (tmp_path / "sheet.png").exists()

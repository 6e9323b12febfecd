"""Data that a user gives becomes sequences with the tokens that may be drafted."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info
from data_pipeline.toy.corpus import write_jsonl
from lora.examples.example_set import select_examples, split_heldout
from lora.examples.records import prepare_examples
from lora.examples.stored_examples import StoredExamples, open_examples
from tests.helpers.stored import random_chats, random_texts, write_dataset
from tests.helpers.tiny_checkpoints import MASK_TOKEN
from tests.helpers.tiny_exports import save_tiny_export

CHAT = [
    {"role": "user", "content": "Why is the sea blue?"},
    {"role": "assistant", "content": "The sea is wide."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Tell me."},
]
TEXTS = [f"The ships go out every day {number}. Why? " * 3 for number in range(8)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint whose config.json gives the model room for the random tokens below."""
    export = save_tiny_export(tmp_path_factory.mktemp("examples") / "export")
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"vocab_size": 60001}))
    return export


def write_tokens(checkpoint: Path, folder: Path, shards: Any, kind: str) -> Path:
    return write_dataset(folder, shards, kind, read_tokenizer_info(checkpoint, MASK_TOKEN).fingerprint)


def open_stored(checkpoint: Path, path: Path, sequence_length: int) -> StoredExamples:
    return open_examples(path, checkpoint=checkpoint, sequence_length=sequence_length, folder=path / "unused")


def open_records(checkpoint: Path, records: Path, folder: Path, sequence_length: int = 64) -> StoredExamples:
    assert prepare_examples(records, checkpoint=checkpoint, folder=folder) == folder
    return open_examples(records, checkpoint=checkpoint, sequence_length=sequence_length, folder=folder)


def flatten(document: list[list[int]]) -> list[int]:
    return [token for segment in document for token in segment]


def test_texts_are_cut_into_consecutive_windows(checkpoint: Path, tmp_path: Path) -> None:
    documents = random_texts(40, 30)
    path = write_tokens(checkpoint, tmp_path / "tokens", [documents[:25], documents[25:]], "text")
    windows = [tokens[i : i + 8] for tokens in map(flatten, documents) for i in range(0, len(tokens), 8)]
    expected = [window for window in windows if len(window) > 1]
    examples = open_stored(checkpoint, path, 8)
    assert [example.tokens.tolist() for example in examples] == expected
    assert len(expected) == len(examples) < len(windows)
    assert all(example.drafted.tolist() == [False] + [True] * (len(example.tokens) - 1) for example in examples)
    assert all(example.tokens.dtype == np.int64 and example.drafted.dtype == bool for example in examples)


def test_chats_keep_their_beginning_and_draft_responses_only(checkpoint: Path, tmp_path: Path) -> None:
    documents = random_chats(40, 12)
    path = write_tokens(checkpoint, tmp_path / "tokens", [documents[:15], documents[15:]], "chat")
    examples = open_stored(checkpoint, path, 10)
    usable = [chat for chat in documents if len(chat[0]) < 10]
    assert [example.tokens.tolist() for example in examples] == [flatten(chat)[:10] for chat in usable]
    for example, chat in zip(examples, usable, strict=True):
        is_response = [number % 2 == 1 for number, segment in enumerate(chat) for _ in segment]
        assert example.drafted.tolist() == is_response[:10]
        assert example.drafted.any()


def test_records_of_chats_are_rendered_as_the_checkpoint_decodes_them(checkpoint: Path, tmp_path: Path) -> None:
    write_jsonl([{"messages": CHAT}], tmp_path / "chats.jsonl")
    (example,) = open_records(checkpoint, tmp_path / "chats.jsonl", tmp_path / "data", 256)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    start = int(example.drafted.argmax())
    assert example.tokens[:start].tolist() == prompt
    assert tokenizer.decode(example.tokens[example.drafted]) == "The sea is wide.<|im_end|>Tell me.<|im_end|>"


def test_texts_in_jsonl_and_parquet_are_the_same_examples(checkpoint: Path, tmp_path: Path) -> None:
    write_jsonl([{"text": text} for text in TEXTS], tmp_path / "texts.jsonl")
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "folder" / "texts.parquet")
    first = open_records(checkpoint, tmp_path / "texts.jsonl", tmp_path / "first")
    second = open_records(checkpoint, tmp_path / "folder", tmp_path / "second")
    assert first.fingerprint == second.fingerprint
    assert [example.tokens.tolist() for example in first] == [example.tokens.tolist() for example in second]


def test_records_are_tokenised_once(checkpoint: Path, tmp_path: Path) -> None:
    records, folder = tmp_path / "texts.jsonl", tmp_path / "data"
    write_jsonl([{"text": text} for text in TEXTS], records)
    prepare_examples(records, checkpoint=checkpoint, folder=folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix}
    prepare_examples(records, checkpoint=checkpoint, folder=folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix}


def test_other_records_do_not_go_into_the_same_folder(checkpoint: Path, tmp_path: Path) -> None:
    records = tmp_path / "texts.jsonl"
    write_jsonl([{"text": text} for text in TEXTS], records)
    prepare_examples(records, checkpoint=checkpoint, folder=tmp_path / "data")
    write_jsonl([{"text": text} for text in TEXTS[1:]], records)
    with pytest.raises(UserError, match="begun with other records"):
        prepare_examples(records, checkpoint=checkpoint, folder=tmp_path / "data")


def test_tokens_are_used_in_place(checkpoint: Path, tmp_path: Path) -> None:
    path = write_tokens(checkpoint, tmp_path / "tokens", [random_texts(4, 9)], "text")
    for folder in (tmp_path / "data", path):
        assert prepare_examples(path, checkpoint=checkpoint, folder=folder) == path
    assert not (tmp_path / "data").exists()


def test_the_fingerprint_covers_tokens_and_length(checkpoint: Path, tmp_path: Path) -> None:
    path = write_tokens(checkpoint, tmp_path / "a", [random_texts(9, 30)], "text")
    other = write_tokens(checkpoint, tmp_path / "b", [random_texts(9, 30, seed=1)], "text")
    sets = [open_stored(checkpoint, path, 8), open_stored(checkpoint, path, 9), open_stored(checkpoint, other, 8)]
    sets += split_heldout(sets[0], 0.2) + split_heldout(sets[0], 0.3)
    assert len({examples.fingerprint for examples in sets}) == len(sets)
    copy = Path(shutil.copytree(path, tmp_path / "copy"))
    assert open_stored(checkpoint, copy, 8).fingerprint == sets[0].fingerprint


def test_whole_documents_are_held_out_whatever_their_order(checkpoint: Path, tmp_path: Path) -> None:
    documents = random_texts(200, 30)
    documents += documents[:20]  # copies
    sides = []
    for name, order in (("a", documents), ("b", documents[::-1])):
        path = write_tokens(checkpoint, tmp_path / name, [order[:70], order[70:]], "text")
        train, heldout = split_heldout(open_stored(checkpoint, path, 30), 0.25)
        sides.append([sorted(example.tokens.tolist() for example in side) for side in (train, heldout)])
    assert sides[0] == sides[1]
    train, heldout = ({tuple(tokens) for tokens in side} for side in sides[0])
    assert not train & heldout
    assert train | heldout == {tuple(flatten(document)) for document in documents if len(document[0]) > 1}
    assert 0.15 < len(heldout) / (len(train) + len(heldout)) < 0.35


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_each_side_has_a_document(checkpoint: Path, tmp_path: Path, share: float) -> None:
    path = write_tokens(checkpoint, tmp_path / "tokens", [[[[10, 11, 2]], [[12, 13, 2]]]], "text")
    assert [len(side) for side in split_heldout(open_stored(checkpoint, path, 8), share)] == [1, 1]


def test_a_single_document_cannot_be_held_out(checkpoint: Path, tmp_path: Path) -> None:
    path = write_tokens(checkpoint, tmp_path / "tokens", [[[[10, 11, 2]], [[10, 11, 2]]]], "text")
    with pytest.raises(UserError, match="hold a single document"):
        split_heldout(open_stored(checkpoint, path, 2), 0.5)


def test_tokens_of_another_tokenizer_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "tokens", [random_texts(4, 9)], fingerprint="0123456789abcdef")
    with pytest.raises(UserError, match="tokenised with tokenizer 0123456789ab, that of the checkpoint"):
        open_stored(checkpoint, path, 8)


def test_tokens_beyond_the_vocabulary_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = write_tokens(checkpoint, tmp_path / "tokens", [[[[60001, 2]]]], "text")
    with pytest.raises(UserError, match=r"token id 60001, but .* has vocab_size 60001"):
        open_stored(checkpoint, path, 8)


def test_changed_tokens_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = write_tokens(checkpoint, tmp_path / "tokens", [random_texts(4, 9)], "text")
    content = bytearray((path / "shard_00000.bin").read_bytes())
    content[0] ^= 1
    (path / "shard_00000.bin").write_bytes(content)
    with pytest.raises(UserError, match="SHA-256 differs"):
        open_stored(checkpoint, path, 8)


def test_unfinished_tokens_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = write_tokens(checkpoint, tmp_path / "tokens", [random_texts(4, 9)], "text")
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no finished dataset"):
        open_stored(checkpoint, path, 8)


@pytest.mark.parametrize(
    ("kind", "document", "message"),
    [("text", [[2]], "none of its texts has two tokens"), ("chat", [[10] * 8, [11, 2]], "begins within .*=8 tokens")],
)
def test_nothing_to_draft_is_an_error(checkpoint: Path, tmp_path: Path, kind: str, document: Any, message: str) -> None:
    path = write_tokens(checkpoint, tmp_path / "tokens", [[document]], kind)
    with pytest.raises(UserError, match=message):
        open_stored(checkpoint, path, 8)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Why?"}, r"neither a column 'messages' \(chats\) nor a column 'text'.* but question\)"),
        (
            {"messages": [*CHAT[:1], {"role": "assistant", "content": ""}]},
            r"unusable.*\n.*\nThose are settings of `python -m data_pipeline.prepare data=chats`",
        ),
        ({"messages": CHAT[:1]}, r"records\.jsonl holds prompts without responses: set responses\.source=greedy"),
        ({"prompt": "Why?"}, r"records\.jsonl holds prompts without responses: set responses\.source=greedy"),
    ],
)
def test_records_that_cannot_be_used_are_explained(checkpoint: Path, tmp_path: Path, record: Any, message: str) -> None:
    write_jsonl([record], tmp_path / "records.jsonl")
    with pytest.raises(UserError, match=message):
        prepare_examples(tmp_path / "records.jsonl", checkpoint=checkpoint, folder=tmp_path / "data")


def test_chats_that_lack_their_response_among_others_are_explained(checkpoint: Path, tmp_path: Path) -> None:
    write_jsonl([{"messages": CHAT}, {"messages": CHAT[:3]}, {"messages": CHAT}], tmp_path / "records.jsonl")
    with pytest.raises(UserError, match=r"records\.jsonl:2: chat ends with the user\n.*set responses\.source=greedy"):
        prepare_examples(tmp_path / "records.jsonl", checkpoint=checkpoint, folder=tmp_path / "data")


def test_errors_name_the_drafters_own_key(checkpoint: Path, tmp_path: Path) -> None:
    write_jsonl([{"messages": CHAT}], tmp_path / "records.jsonl")
    with pytest.raises(UserError, match=r": chat_template is null"):
        prepare_examples(
            tmp_path / "records.jsonl", checkpoint=checkpoint, folder=tmp_path / "data", chat_template="none"
        )


def test_missing_data_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"records\.jsonl does not exist"):
        prepare_examples(tmp_path / "records.jsonl", checkpoint=checkpoint, folder=tmp_path / "data")


def test_a_base_checkpoint_is_refused(tmp_path: Path) -> None:
    write_jsonl([{"text": "Why?"}], tmp_path / "records.jsonl")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "mistral3"}))
    with pytest.raises(UserError, match="is no tri-mode checkpoint"):
        prepare_examples(tmp_path / "records.jsonl", checkpoint=tmp_path / "base", folder=tmp_path / "data")


def test_another_chat_template_is_logged(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl([{"messages": CHAT}], tmp_path / "chats.jsonl")
    open_records(checkpoint, tmp_path / "chats.jsonl", tmp_path / "data", 256)
    assert not caplog.records
    other = Path(shutil.copytree(checkpoint, tmp_path / "export"))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    open_stored(other, tmp_path / "data", 256)
    assert "another chat template" in caplog.text


def test_fewer_examples_are_a_random_choice_in_the_same_order(checkpoint: Path, tmp_path: Path) -> None:
    path = write_tokens(checkpoint, tmp_path / "tokens", [random_texts(60, 9)], "text")
    examples = open_stored(checkpoint, path, 9)
    everything = [tuple(example.tokens.tolist()) for example in examples]
    few, more = ([everything.index(tuple(e.tokens.tolist())) for e in select_examples(examples, n, 1)] for n in (9, 20))
    assert (len(few), len(more)) == (9, 20)
    assert few == sorted(few) and set(few) < set(more)
    assert few != list(range(9))
    assert select_examples(examples, len(examples), 1) is examples
    assert select_examples(examples, 9, 2).fingerprint != select_examples(examples, 9, 1).fingerprint


def test_corrected_records_begin_anew(checkpoint: Path, tmp_path: Path) -> None:
    records, folder = tmp_path / "records.jsonl", tmp_path / "tokens"
    records.write_text(json.dumps({"text": TEXTS[0]}) + "\n{broken\n")
    with pytest.raises(UserError, match="unusable") as caught:
        prepare_examples(records, checkpoint=checkpoint, folder=folder)
    (listing,) = re.findall(r"All are listed in (\S+)\. The first", str(caught.value))
    assert Path(listing).is_file()
    write_jsonl(({"text": text} for text in TEXTS), records)
    assert prepare_examples(records, checkpoint=checkpoint, folder=folder) == folder


def test_files_of_somebody_else_are_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    records, folder = tmp_path / "records.jsonl", tmp_path / "tokens"
    write_jsonl(({"text": text} for text in TEXTS), records)
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"did not make \(thesis\.txt\)"):
        prepare_examples(records, checkpoint=checkpoint, folder=folder)
    assert (folder / "thesis.txt").read_text() == "mine"

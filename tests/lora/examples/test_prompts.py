"""Prompts without responses: read whole, split by their content, responded to by the model."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from conf.schema.drafter import ResponsesConfig, ResponseSource
from conf.system.errors import UserError
from data_pipeline.toy.corpus import write_jsonl
from lora.examples.example_set import select_examples, split_heldout
from lora.examples.prompts import RecordPrompts, find_prompt_files, open_record_prompts
from lora.examples.responses import ResponseTask, build_response_task, decode_responses, load_responses
from tests.helpers.stored import random_texts, write_dataset
from tests.helpers.tiny_exports import make_tiny_model, save_tiny_export

SEQUENCE_LENGTH, PROMPT_TOKENS = 48, 6
# Marks no responses: prepare refuses it, as it would those of many released checkpoints.
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "Why is the sea blue?"}]
RECORDS: list[dict[str, Any]] = [
    {"messages": CHAT},
    {"prompt": "The sea is "},
    {"text": "Tell me a story about the sea. The sea is wide and blue."},
    {"messages": [*CHAT, {"role": "assistant", "content": "It is wide."}], "group": 7},
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    export = save_tiny_export(tmp_path_factory.mktemp("prompts") / "export")
    (export / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    return export


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(checkpoint)


def open_prompts(checkpoint: Path, path: Path, records: list[dict[str, Any]], **changes: Any) -> RecordPrompts:
    write_jsonl(records, path)
    options: dict[str, Any] = {"sequence_length": SEQUENCE_LENGTH, "prompt_tokens": PROMPT_TOKENS} | changes
    return open_record_prompts(find_prompt_files(path), checkpoint=checkpoint, **options)


def plan(prompts: RecordPrompts, cache: Path) -> ResponseTask:
    config = ResponsesConfig(ResponseSource.greedy, max_new_tokens=5, prompts_per_shard=2, batch_size=2)
    return build_response_task(
        prompts, config, cache=cache, checkpoint="one", dtype=torch.float32, stop_ids=(11,), seed=1
    )


def list_prompts(prompts: RecordPrompts) -> list[list[int]]:
    return [prompts.read(number).tolist() for number in range(len(prompts))]


def test_every_record_is_a_prompt_also_where_the_template_marks_no_responses(
    checkpoint: Path, tokenizer: Any, tmp_path: Path
) -> None:
    prompts = open_prompts(checkpoint, tmp_path / "records.jsonl", RECORDS)
    question = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    text = tokenizer(RECORDS[2]["text"], add_special_tokens=False)["input_ids"][:PROMPT_TOKENS]
    assert list_prompts(prompts) == [question, tokenizer("The sea is ")["input_ids"], text, question]
    assert prompts.lengths.tolist() == [len(tokens) for tokens in list_prompts(prompts)]


def test_the_model_responds_to_every_prompt_once(checkpoint: Path, tmp_path: Path) -> None:
    prompts, model = open_prompts(checkpoint, tmp_path / "records.jsonl", RECORDS), make_tiny_model()
    what = plan(prompts, tmp_path / "cache")
    decode_responses(model, what)
    responses = load_responses(what)
    assert len(responses) == len(RECORDS)
    for example, prompt in zip(responses, list_prompts(prompts), strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            while len(tokens) < len(prompt) + 5 and not (len(tokens) > len(prompt) and tokens[-1] == 11):
                logits = model(torch.tensor([tokens])).logits[0, -1]
                logits[model.config.mask_token_id] = -torch.inf
                tokens.append(int(logits.argmax()))
        assert example.tokens.tolist() == tokens
        assert example.drafted.tolist() == [False] * len(prompt) + [True] * (len(tokens) - len(prompt))


def test_responses_belong_to_the_content_of_prompts(checkpoint: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"The sea {number}"} for number in range(9)]
    first = open_prompts(checkpoint, tmp_path / "first.jsonl", records)
    same = open_prompts(checkpoint, tmp_path / "same.jsonl", records)
    others = [
        open_prompts(checkpoint, tmp_path / "changed.jsonl", [*records[:-1], {"prompt": "The sea 9"}]),
        open_prompts(checkpoint, tmp_path / "order.jsonl", records[::-1]),
        open_prompts(checkpoint, tmp_path / "first.jsonl", records, sequence_length=SEQUENCE_LENGTH + 1),
        select_examples(first, 4, seed=1),
        select_examples(first, 4, seed=2),
        # The same tokens in a row, cut elsewhere.
        RecordPrompts(np.arange(5, dtype=np.int32), np.array([2, 3]), 9),
        RecordPrompts(np.arange(5, dtype=np.int32), np.array([3, 2]), 9),
    ]
    folders = [plan(prompts, tmp_path).cache.folder for prompts in (first, same, *others)]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 1 + len(others)


def test_prompts_without_room_for_a_response_are_left_out_and_counted(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"prompt": "the sea " * count} for count in (1, 2, 30, 60)]
    whole = open_prompts(checkpoint, tmp_path / "records.jsonl", records, sequence_length=999)
    longest = int(whole.lengths[1])
    caplog.clear()
    fitting = open_prompts(checkpoint, tmp_path / "records.jsonl", records, sequence_length=longest + 1)
    assert list_prompts(fitting) == list_prompts(whole)[:2]
    assert f"2 of 4 prompts leave no room for a response within train.sequence_length={longest + 1}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        open_prompts(checkpoint, tmp_path / "records.jsonl", records, sequence_length=999)
    assert "4 prompts" in caplog.text and "no room" not in caplog.text
    with pytest.raises(
        UserError, match=r"records\.jsonl: no prompt leaves room .*train\.sequence_length=2 tokens: raise"
    ):
        open_prompts(checkpoint, tmp_path / "records.jsonl", records, sequence_length=2)


def test_prompts_are_held_out_by_their_content_with_their_copies(checkpoint: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"Why {number}? Tell me."} for number in range(60)]
    records += records[:9]
    sides = []
    for order in (records, records[::-1]):
        split = split_heldout(open_prompts(checkpoint, tmp_path / "records.jsonl", order), 0.25)
        sides.append([sorted(map(tuple, list_prompts(side))) for side in split])
    assert sides[0] == sides[1]
    train, heldout = sides[0]
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == len(records)
    assert 5 <= len(set(heldout)) <= 25
    for share in (1e-9, 1 - 1e-9):
        pair = split_heldout(open_prompts(checkpoint, tmp_path / "records.jsonl", records[:2]), share)
        assert [len(side) for side in pair] == [1, 1]
    with pytest.raises(UserError, match="hold a single document"):
        split_heldout(open_prompts(checkpoint, tmp_path / "records.jsonl", [records[0], records[0]]), 0.5)


def test_chats_may_be_rendered_by_another_template(checkpoint: Path, tmp_path: Path) -> None:
    other, records = tmp_path / "other.jinja", [{"messages": CHAT}]
    other.write_text("{{ messages[0].content }}")
    own = open_prompts(checkpoint, tmp_path / "records.jsonl", records)
    given = open_prompts(checkpoint, tmp_path / "records.jsonl", records, chat_template=str(other))
    plain = open_prompts(checkpoint, tmp_path / "records.jsonl", [{"prompt": CHAT[0]["content"]}])
    assert list_prompts(given) == list_prompts(plain) != list_prompts(own)
    with pytest.raises(UserError, match=r": chat_template is null"):
        open_prompts(checkpoint, tmp_path / "records.jsonl", records, chat_template=str(tmp_path / "nowhere"))


def test_files_of_prompts_are_distinguished_from_tokens_and_other_records(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        write_jsonl([{"prompt": name}], folder / name)
    expected = [folder / "a.jsonl", folder / "b.jsonl"]
    assert find_prompt_files(folder) == find_prompt_files(f"{folder}/*.jsonl") == expected
    assert find_prompt_files(folder / "b.jsonl") == expected[1:]
    write_dataset(tmp_path / "tokens", [random_texts(4, 9)], "text")
    assert find_prompt_files(tmp_path / "tokens") == []
    shutil.copy(folder / "a.jsonl", folder / "c.parquet")
    (folder / "c.parquet").write_bytes(b"other bytes")
    assert find_prompt_files(folder) == []
    with pytest.raises(UserError, match="does not exist"):
        find_prompt_files(tmp_path / "nowhere.jsonl")


def test_no_prompts_and_foreign_tokenizers_are_errors(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    options: dict[str, Any] = {"sequence_length": SEQUENCE_LENGTH, "prompt_tokens": PROMPT_TOKENS}
    with pytest.raises(UserError, match=r"no prompts in .*empty\.jsonl"):
        open_record_prompts([tmp_path / "empty.jsonl"], checkpoint=checkpoint, **options)
    with pytest.raises(UserError, match=r"records\.jsonl:1 has none of prompt, messages, text"):
        open_prompts(checkpoint, tmp_path / "records.jsonl", [{"question": "Why?"}])
    other = Path(shutil.copytree(checkpoint, tmp_path / "export"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match="it belongs to another model"):
        open_prompts(other, tmp_path / "records.jsonl", RECORDS)

"""Token ids of chats, against transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BatchEncoding, PreTrainedTokenizerBase

from data_pipeline.chat.encoder import ChatEncoder, build_chat_encoder
from data_pipeline.chat.template import CHATML_PATH
from data_pipeline.encoder import Skip
from data_pipeline.toy.corpus import load_docstring_chats
from data_pipeline.toy.tokenizer import MASK_TOKEN
from tests.data_pipeline.chat.conftest import CHATS

IMPORT_PROBE = """
import sys
from pathlib import Path
from data_pipeline.chat.encoder import build_chat_encoder
encoder = build_chat_encoder(Path(sys.argv[1]), "<SPECIAL_100>", "chatml")
encoder.encode([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
print(sorted({"torch", "megatron", "hydra", "omegaconf"} & set(sys.modules)))
"""


def encode_one(encoder: ChatEncoder, chat: object) -> list[list[int]]:
    (segments,) = encoder.encode([chat])
    assert not isinstance(segments, Skip), segments
    return segments


def test_ids_and_responses_are_those_of_apply_chat_template(
    chat: list[dict[str, Any]], encoder: ChatEncoder, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    segments = encode_one(encoder, chat)
    expected = chat_tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert isinstance(expected, BatchEncoding)
    trailing = chat_tokenizer.encode("\n", add_special_tokens=False)
    ids = [token for segment in segments for token in segment]
    mask = [place % 2 for place, segment in enumerate(segments) for _ in segment]
    assert ids + trailing == expected["input_ids"]
    assert mask + [0] * len(trailing) == expected["assistant_masks"]


def test_segments_decode_to_the_rendered_chat(
    chat: list[dict[str, Any]], encoder: ChatEncoder, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = [token for segment in encode_one(encoder, chat) for token in segment]
    assert f"{chat_tokenizer.decode(ids)}\n" == chat_tokenizer.apply_chat_template(chat, tokenize=False)


def test_every_response_ends_with_the_only_end_of_turn_in_it(chat: list[dict[str, Any]], encoder: ChatEncoder) -> None:
    assert encoder.block_padding_token_id == 11
    for response in encode_one(encoder, chat)[1::2]:
        assert response[-1] == 11
        assert response.count(11) == 1


def test_no_token_spans_the_boundary_between_prompt_and_response(
    encoder: ChatEncoder, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    """White space at the start of a response would merge with the prompt's newline if they were encoded together."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\n  b"}]
    prompt, response = encode_one(encoder, chat)
    assert prompt == chat_tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert chat_tokenizer.decode(response) == "\n\n  b<|im_end|>"


def test_a_batch_keeps_its_order_around_skipped_records(encoder: ChatEncoder) -> None:
    chats = list(CHATS.values())
    records = [None, *chats, [], "text", chats[0]]
    result = encoder.encode(records)
    assert [isinstance(item, Skip) for item in result] == [True, *[False] * len(chats), True, True, False]
    assert result[1:-3] == [encode_one(encoder, chat) for chat in chats]
    assert encoder.encode([]) == []


def test_truncation_and_padding_saved_in_a_tokenizer_file_do_not_count(
    base_tokenizer_dir: Path, tmp_path: Path, encoder: ChatEncoder, chat: list[dict[str, Any]]
) -> None:
    directory = shutil.copytree(base_tokenizer_dir, tmp_path / "tokenizer")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    assert build_chat_encoder(directory, MASK_TOKEN, "chatml").encode([chat]) == encoder.encode([chat])


def test_settings_name_the_template(encoder: ChatEncoder, base_tokenizer_dir: Path, tmp_path: Path) -> None:
    settings = encoder.settings()
    assert settings["chat_template"] == CHATML_PATH.read_text(encoding="utf-8")
    assert json.loads(json.dumps(settings)) == settings
    (tmp_path / "mine.jinja").write_text(CHATML_PATH.read_text() + "{# mine #}")
    other = build_chat_encoder(base_tokenizer_dir, MASK_TOKEN, str(tmp_path / "mine.jinja"))
    assert other.settings() != settings


def test_a_tokenizer_s_own_template_is_used(
    chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, encoder: ChatEncoder, chat: list[dict[str, Any]]
) -> None:
    chat_tokenizer.save_pretrained(tmp_path)
    assert build_chat_encoder(tmp_path, MASK_TOKEN, None).encode([chat]) == encoder.encode([chat])


def test_encoding_chats_imports_neither_torch_nor_configuration_libraries(base_tokenizer_dir: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE, str(base_tokenizer_dir)], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("length", [1, 500])
def test_long_chats_are_encoded_whole(encoder: ChatEncoder, length: int) -> None:
    segments = encode_one(encoder, CHATS["one turn"] * length)
    assert len(segments) == 2 * length


def test_every_docstring_chat_can_be_encoded(encoder: ChatEncoder) -> None:
    split = load_docstring_chats()
    chats = split.train[::10] + split.heldout
    assert [item for item in encoder.encode(chats) if isinstance(item, Skip)] == []

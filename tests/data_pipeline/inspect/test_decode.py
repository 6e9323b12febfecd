from pathlib import Path

import pytest
from tokenizers import Tokenizer

from conf.system.errors import UserError
from data_pipeline.inspect.decode import IdDecoder, TextDecoder
from data_pipeline.inspect.samples import decode_chunks

TEXTS = [
    "def function_1(x):\n\treturn x\n",
    "naïve café — 日本語 ✓ 🙂 a\u0301\x1b[31m",
    "replacement \ufffd\ufffd\ufffd\ufffd\ufffd kept",
]


def encode(tokenizer_dir: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_together_are_the_text_and_cover_every_token(tokenizer_dir: Path, text: str) -> None:
    ids = encode(tokenizer_dir, text)
    chunks = list(TextDecoder(tokenizer_dir).decode(ids))
    assert "".join(chunk.text for chunk in chunks) == text
    assert sum(chunk.num_tokens for chunk in chunks) == len(ids)
    assert not any(chunk.is_special for chunk in chunks)


def test_a_character_cut_by_the_end_is_one_replacement_per_token(tokenizer_dir: Path) -> None:
    ids = encode(tokenizer_dir, "x🙂")
    assert len(ids) == 5
    assert [chunk.text for chunk in TextDecoder(tokenizer_dir).decode(ids[:-1])] == ["x", "\ufffd", "\ufffd", "\ufffd"]
    assert "".join(chunk.text for chunk in TextDecoder(tokenizer_dir).decode([*ids[:3], *ids[:1]])).endswith("x")


def test_a_character_of_which_some_tokens_are_masked_is_shown_token_by_token(tokenizer_dir: Path) -> None:
    ids = encode(tokenizer_dir, "é")
    decoder = TextDecoder(tokenizer_dir)
    assert [(p.text, p.is_masked) for p in decode_chunks(ids, [True, True], decoder)] == [("é", True)]
    assert [(p.text, p.is_masked) for p in decode_chunks(ids, [True, False], decoder)] == [
        ("\ufffd", True),
        ("\ufffd", False),
    ]


def test_special_tokens_stand_alone_and_unknown_ids_are_named(tokenizer_dir: Path) -> None:
    ids = [*encode(tokenizer_dir, "x"), 2, 2, 65000]
    chunks = list(TextDecoder(tokenizer_dir).decode(ids))
    assert [(chunk.text, chunk.is_special) for chunk in chunks] == [
        ("x", False),
        ("</s>", True),
        ("</s>", True),
        ("<no token 65000>", True),
    ]


def test_without_a_tokenizer_ids_are_shown() -> None:
    assert "".join(chunk.text for chunk in IdDecoder().decode([5, 17])) == "5 17 "


def test_a_broken_tokenizer_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(UserError, match="cannot be loaded"):
        TextDecoder(tmp_path)

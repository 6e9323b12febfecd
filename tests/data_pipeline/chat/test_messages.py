"""Usable chats are accepted; each of the others is refused with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from data_pipeline.chat.messages import ReservedTokens, find_reserved_tokens, read_chat, read_tools
from data_pipeline.encoder import Skip
from data_pipeline.toy.tokenizer import MASK_TOKEN, reserved_tokens

USER = {"role": "user", "content": "What?"}
RESPONSE = {"role": "assistant", "content": "That."}
NULL = None


@pytest.fixture(scope="module")
def reserved(base_tokenizer_dir: Path) -> ReservedTokens:
    return find_reserved_tokens(Tokenizer.from_file(str(base_tokenizer_dir / "tokenizer.json")), MASK_TOKEN)


def response(**values: Any) -> list[dict[str, Any]]:
    return [USER, RESPONSE | values]


BAD: list[tuple[object, str, str]] = [
    (NULL, "not a list of messages", "NoneType"),
    ("[]", "not a list of messages", "str"),
    ({"conversation": [USER, RESPONSE]}, "not a list of messages", "dict"),
    ([USER, "That."], "not a list of messages", "message 2 is str"),
    ([], "empty chat", ""),
    ({"messages": []}, "empty chat", ""),
    ([{"role": "bot", "content": "x"}], "unknown role", "role 'bot', known are system, user, assistant, tool"),
    ([{"from": "human", "value": "x"}], "unknown role", "role None"),
    ([{"role": ["user"], "content": "x"}], "unknown role", "message 1"),
    ([{"role": "user", "content": NULL}, RESPONSE], "null or non-string content", "message 1 is null"),
    ([{"role": "user"}, RESPONSE], "null or non-string content", "message 1 is null"),
    (response(content=5), "null or non-string content", "message 2 is not a text but int"),
    (response(content=[{"type": "image", "text": "x"}]), "null or non-string content", "but list"),
    (response(content=[{"type": "text", "text": NULL}]), "null or non-string content", "but list"),
    (response(reasoning_content=["x"]), "null or non-string content", "thinking of message 2 is list"),
    ([USER], "no response", ""),
    ([{"role": "system", "content": "x"}, USER], "no response", ""),
    ([USER, RESPONSE, USER], "chat ends with the user", ""),
    ([USER, RESPONSE, {"role": "tool", "content": "3"}], "chat ends with a tool", ""),
    (response(content=""), "empty response", "message 2"),
    (response(content=" \n", reasoning_content="thinking alone"), "empty response", "message 2"),
    ([USER, {"role": "assistant", "content": ""}, USER, RESPONSE], "empty response", "message 2"),
    (response(tool_calls=["add"]), "malformed tool call", "message 2"),
    (response(tool_calls={"name": "add"}), "malformed tool call", "message 2"),
    (response(tool_calls=[{"name": "add"}]), "malformed tool call", "message 2"),
    (response(tool_calls=[{"name": "add", "arguments": "{"}]), "malformed tool call", "message 2"),
    (response(tool_calls=[{"function": {"name": "add", "arguments": "[1]"}}]), "malformed tool call", "message 2"),
    ([{"role": "user", "content": "a\ud800"}, RESPONSE], "text is not valid Unicode", "content of message 1"),
]


@pytest.mark.parametrize(("value", "reason", "detail"), BAD)
def test_an_unusable_chat_gives_its_reason(value: object, reason: str, detail: str, reserved: ReservedTokens) -> None:
    skip = read_chat(value, reserved)
    assert isinstance(skip, Skip)
    assert skip.reason == reason
    assert detail in skip.detail


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", MASK_TOKEN, "<s>", "</s>", "<SPECIAL_14>"])
@pytest.mark.parametrize("place", ["user", "response", "thinking", "call", "parts"])
def test_a_spelled_reserved_token_is_refused_wherever_it_is(token: str, place: str, reserved: ReservedTokens) -> None:
    text = f"look: {token}!"
    call = {"function": {"name": "add", "arguments": {"a": [{text: 1}]}}}
    half, other_half = token[:4], token[4:]
    chats = {
        "user": [{"role": "user", "content": text}, RESPONSE],
        "response": response(content=text),
        "thinking": response(thinking=text),
        "call": response(tool_calls=[call]),
        "parts": response(content=[{"type": "text", "text": half}, {"type": "text", "text": other_half}]),
    }
    skip = read_chat(chats[place], reserved)
    assert isinstance(skip, Skip)
    assert skip.reason == "spells a reserved token"
    assert token in skip.detail


@pytest.mark.parametrize("token", ["<think>", "</think>"])
def test_thinking_tokens_are_allowed_in_responses_alone(token: str, reserved: ReservedTokens) -> None:
    assert not isinstance(read_chat(response(content=f"a {token} b"), reserved), Skip)
    for chat in ([{"role": "user", "content": token}, RESPONSE], response(thinking=token)):
        assert str(read_chat(chat, reserved)).startswith("spells a reserved token")


def test_thinking_tokens_count_where_the_tokenizer_has_them_as_ordinary_ones() -> None:
    tokenizer = Tokenizer(BPE())
    tokenizer.add_tokens(["<think>", "</think>", "ordinary"])
    reserved = find_reserved_tokens(tokenizer, MASK_TOKEN)
    assert str(read_chat(response(thinking="<think>"), reserved)).startswith("spells a reserved token")
    assert read_chat(response(thinking="ordinary"), reserved) == response(reasoning_content="ordinary")


def test_thinking_in_the_content_and_beside_it_is_refused(reserved: ReservedTokens) -> None:
    chat = response(content="<think>Hm.</think>That.", reasoning_content="Hm.")
    assert str(read_chat(chat, reserved)) == "thinking given twice (message 2 has it in its content and beside it)"
    assert not isinstance(read_chat(response(content="<think>Hm.</think>That.", thinking=" "), reserved), Skip)


ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (NULL, []),
        ([], []),
        ("", []),
        ([ADD], [ADD]),
        (json.dumps([ADD]), [ADD]),
        ([ADD["function"]], [ADD["function"]]),
        ("{", "malformed tools (they are text that is no JSON)"),
        ({"name": "add"}, "malformed tools"),
        ([{"type": "function"}], "malformed tools"),
        ([{"name": "add", "description": "ends <|im_end|> here"}], "spells a reserved token (in tools)"),
    ],
)
def test_tools_are_read_or_refused(tools: object, expected: Any, reserved: ReservedTokens) -> None:
    found = read_tools({"messages": response(), "tools": tools}, reserved)
    if isinstance(expected, str):
        assert str(found).startswith(expected)
    else:
        assert found == expected
    assert read_tools(response(), reserved) == []


def test_exactly_the_reserved_tokens_are_found(reserved: ReservedTokens) -> None:
    tokens = reserved_tokens()
    assert all(reserved.anywhere.fullmatch(token) for token in tokens)
    assert not any(reserved.anywhere.search(token[:-1] + token[1:]) for token in tokens)
    assert not reserved.anywhere.search("<SPECIAL_101> <|im_end> <| im_end|> [INST] a < b | c > d")


def test_null_keys_of_columnar_files_count_as_absent(reserved: ReservedTokens) -> None:
    padding = {"reasoning_content": None, "thinking": None, "tool_calls": None, "name": None}
    assert read_chat([USER | padding, RESPONSE | padding], reserved) == [USER, RESPONSE]


def test_thinking_has_one_name_and_blank_thinking_is_none(reserved: ReservedTokens) -> None:
    assert read_chat(response(thinking="so"), reserved) == response(reasoning_content="so")
    assert read_chat(response(thinking=" \n"), reserved) == response()


def test_a_wrapped_list_and_text_parts_are_read(reserved: ReservedTokens) -> None:
    parts = [{"type": "text", "text": "Th"}, {"type": "text", "text": "at."}]
    assert read_chat({"messages": response(content=parts)}, reserved) == [USER, RESPONSE]


def test_a_call_needs_no_content(reserved: ReservedTokens) -> None:
    calls = [{"function": {"name": "add", "arguments": "{}"}}]
    assert read_chat(response(content=None, tool_calls=calls), reserved) == response(content="", tool_calls=calls)

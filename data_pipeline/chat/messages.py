"""Check a chat: turn whatever a record holds into messages that a template can render, or give the reason why not.

A message is {role, content}, an assistant's also `reasoning_content` (or `thinking`) and `tool_calls`. Keys that are
null count as absent, because columnar files give every message every key.

Once a chat is rendered, a marker of the template looks like one that somebody wrote: a text with `<|im_end|>` in it
would end its turn, one with the mask token would pass for noise. Such chats are left out.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from data_pipeline.encoder import Skip

ROLES = ("system", "user", "assistant", "tool")
THINKING_KEYS = ("reasoning_content", "thinking")
PLAIN_KEYS = ("name", "tool_call_id")  # short texts that some templates write
ENDINGS = {"user": "the user", "tool": "a tool", "system": "the system"}

THINKING_TOKENS = frozenset({"<think>", "</think>"})

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True)
class ReservedTokens:
    """Holds patterns of the tokens that a text may not spell.

    anywhere: in any text. in_responses: in the content of an assistant, which may write its thinking out.
    """

    anywhere: re.Pattern[str]
    in_responses: re.Pattern[str]


class _Unusable(Exception):
    """Carries the Skip from wherever a chat turned out to be unusable."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.skip = Skip(reason, detail)


def read_chat(value: object, reserved: ReservedTokens) -> list[Message] | Skip:
    """Return the messages of a record's value, which is a list of them or {"messages": such a list}.

    Each has `role` and `content` (a string), and only where there is any, `reasoning_content`, `tool_calls`, `name`
    and `tool_call_id`.
    """
    try:
        messages = [_read_message(item, number) for number, item in enumerate(_list_of_messages(value), start=1)]
        _check_turns(messages)
        for number, message in enumerate(messages, start=1):
            _check_texts(message, number, reserved)
        return messages
    except _Unusable as unusable:
        return unusable.skip


def read_tools(value: object, reserved: ReservedTokens) -> list[Tool] | Skip:
    """Return the tools in a record's value {"messages": ..., "tools": a list or its JSON}; none where it has none.

    Each describes a function: {"type": "function", "function": {"name", ...}} or {"name", ...}.
    """
    tools = value.get("tools") if isinstance(value, dict) else None
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError:
        return Skip("malformed tools", "they are text that is no JSON")
    if not tools:
        return []
    if not isinstance(tools, list) or not all(_is_tool(tool) for tool in tools):
        return Skip("malformed tools", "each is a function's name and its description")
    try:
        _check_texts({"role": "tools", "tools": tools}, 0, reserved)
    except _Unusable as unusable:
        return Skip(unusable.skip.reason, "in tools")
    return tools


def _is_tool(tool: object) -> bool:
    return isinstance(tool, dict) and isinstance(name_of_tool(tool), str)


def name_of_tool(tool: Tool) -> Any:
    """Return the name of the function that a tool describes."""
    function = tool.get("function") or tool
    return function.get("name") if isinstance(function, dict) else None


def _list_of_messages(value: object) -> list[object]:
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if not isinstance(value, list):
        raise _Unusable("not a list of messages", f"but {type(value).__name__}")
    if not value:
        raise _Unusable("empty chat")
    return value


def _read_message(item: object, number: int) -> Message:
    if not isinstance(item, dict):
        raise _Unusable("not a list of messages", f"message {number} is {type(item).__name__}")
    role = item.get("role")
    if role not in ROLES:
        raise _Unusable("unknown role", f"message {number} has role {role!r}, known are {', '.join(ROLES)}")
    message: Message = {"role": role}
    if role == "assistant":
        message |= _read_thinking(item, number) | _read_tool_calls(item, number)
    content = item.get("content")
    message["content"] = "" if content is None and "tool_calls" in message else _read_content(content, number)
    if "reasoning_content" in message and any(token in message["content"] for token in THINKING_TOKENS):
        raise _Unusable("thinking given twice", f"message {number} has it in its content and beside it")
    for key in PLAIN_KEYS:
        if isinstance(item.get(key), str):
            message[key] = item[key]
    return message


def _read_content(content: object, number: int) -> str:
    """Return the text of a string, or of parts {"type": "text", "text": ...} that together are one."""
    if isinstance(content, list):
        texts = [part.get("text") if _is_text_part(part) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else content  # type: ignore[arg-type]
    if not isinstance(content, str):
        kind = "null" if content is None else f"not a text but {type(content).__name__}"
        raise _Unusable("null or non-string content", f"content of message {number} is {kind}")
    return content


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text"


def _read_thinking(item: dict[str, Any], number: int) -> Message:
    thinking = next((item[key] for key in THINKING_KEYS if item.get(key) is not None), "")
    if not isinstance(thinking, str):
        raise _Unusable("null or non-string content", f"thinking of message {number} is {type(thinking).__name__}")
    return {"reasoning_content": thinking} if thinking.strip() else {}


def _read_tool_calls(item: dict[str, Any], number: int) -> Message:
    """Return calls as given: {"function": {"name", "arguments"}} or {"name", "arguments"}, whose arguments are JSON."""
    calls = item.get("tool_calls") or []
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        raise _Unusable("malformed tool call", f"message {number}: a call is a function's name and its arguments")
    return {"tool_calls": calls} if calls else {}


def _is_call(call: object) -> bool:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return False
    return isinstance(arguments, dict)


def _check_turns(messages: list[Message]) -> None:
    if all(message["role"] != "assistant" for message in messages):
        raise _Unusable("no response", "no message of the assistant")
    last = messages[-1]["role"]
    if last != "assistant":
        raise _Unusable(f"chat ends with {ENDINGS[last]}")
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not message["content"].strip() and "tool_calls" not in message:
            raise _Unusable("empty response", f"message {number}")


def _check_texts(message: Message, number: int, reserved: ReservedTokens) -> None:
    """Raise _Unusable for text that cannot be encoded, or would be encoded as something other than text."""
    for key, value in message.items():
        is_response = key == "content" and message["role"] == "assistant"
        pattern = reserved.in_responses if is_response else reserved.anywhere
        for text in _texts_within(value):
            if not _is_unicode(text):
                raise _Unusable("text is not valid Unicode", f"{key} of message {number}")
            if spelled := pattern.search(text):
                raise _Unusable("spells a reserved token", f"{spelled.group()!r} in {key} of message {number}")


def _texts_within(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts_within(key)
            yield from _texts_within(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_within(item)


def _is_unicode(text: str) -> bool:
    """Return whether UTF-8 can hold the text; it cannot hold a lone surrogate, which is half a character."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_reserved_tokens(tokenizer: Tokenizer, mask_token: str) -> ReservedTokens:
    """Find the special tokens of the tokenizer, thinking tokens and the mask token."""
    added = tokenizer.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special or token.content in THINKING_TOKENS} | {mask_token}
    return ReservedTokens(re.compile(_alternatives(special)), re.compile(_alternatives(special - THINKING_TOKENS)))


def _alternatives(texts: Iterable[str]) -> str:
    """Return a regular expression of `texts`; common beginnings are written once, as there may be a thousand."""
    rests: dict[str, list[str]] = {}
    for text in texts:
        if not text:
            return ""  # what has matched so far is enough
        rests.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + _alternatives(rests[first]) for first in sorted(rests)]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"

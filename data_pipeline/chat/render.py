"""Render chats as text, cut where the assistant's responses begin and end.

Before the first record, check_template tries a template and a tokenizer on a chat of our own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from conf.system.errors import UserError
from data_pipeline.chat.messages import Message, Tool, name_of_tool
from data_pipeline.chat.template import CHATML_MARKERS
from data_pipeline.encoder import Skip


@dataclass(frozen=True)
class RenderedChat:
    """Holds a chat as text.

    text: the whole chat. responses: [start, end) characters of what stands in `{% generation %}` tags, in order.
    """

    text: str
    responses: list[tuple[int, int]]


class ChatRenderer:
    """Render with one template, as transformers' apply_chat_template does (which compiles it once per process).

    template: its text. template_tokens: special tokens it can name ({"bos_token": "<s>"}).
    """

    def __init__(self, template: str, template_tokens: dict[str, str]) -> None:
        self._template = template
        self._template_tokens = template_tokens

    def render(self, messages: list[Message], tools: Sequence[Tool] = ()) -> RenderedChat:
        """Render the complete chat. Raises whatever the template raises."""
        texts, responses = self._call(messages, tools=list(tools) or None, return_assistant_tokens_mask=True)
        return RenderedChat(texts[0], responses[0])

    def render_prompt(self, messages: list[Message]) -> str:
        """Render what decoding starts from: the chat and the beginning of the assistant's next turn."""
        texts, _ = self._call(messages, add_generation_prompt=True)
        return texts[0]

    def split(self, messages: list[Message], tools: Sequence[Tool] = ()) -> list[str] | Skip:
        """Return the texts of prompt, response, prompt, response, ...; what follows the last response is left out.

        Return the reason instead if the template rejects the chat, or drops or rewrites a part of it, tools included.
        """
        try:
            rendered = self.render(messages, tools)
        except Exception as error:  # a template is a program: it can fail in any way
            return Skip("rejected by the chat template", f"{type(error).__name__}: {error}")
        assistants = [message for message in messages if message["role"] == "assistant"]
        segments = _cut(rendered)
        if len(rendered.responses) != len(assistants) or not all(segments):
            return Skip("responses not marked by the chat template")
        for message, response in zip(assistants, segments[1::2], strict=True):
            if missing := _find_missing(message, response):
                return Skip("part of a response not rendered by the chat template", missing)
        for message in messages:
            if message["content"].strip() not in rendered.text:
                return Skip("message not rendered by the chat template", f"role {message['role']}")
        for name in map(name_of_tool, tools):
            if name not in segments[0]:
                return Skip("tools not rendered by the chat template", name)
        return segments

    def _call(self, messages: list[Message], **settings: Any) -> tuple[list[str], list[list[tuple[int, int]]]]:
        arguments: dict[str, Any] = {**self._template_tokens, **settings}
        return render_jinja_template([messages], chat_template=self._template, **arguments)  # type: ignore[return-value]


def _cut(rendered: RenderedChat) -> list[str]:
    segments, position = [], 0
    for start, end in rendered.responses:
        segments += [rendered.text[position:start], rendered.text[start:end]]
        position = end
    return segments


def _find_missing(message: Message, response: str) -> str:
    """Name the part of an assistant's message that its response lacks, if any. Templates may trim white space."""
    if message["content"].strip() not in response:
        return "content"
    if message.get("reasoning_content", "").strip() not in response:
        return "thinking"
    names = [(call.get("function") or call)["name"] for call in message.get("tool_calls", [])]
    return "" if all(name in response for name in names) else "tool calls"


PROBE: list[Message] = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And how is that spelled in digits?"},
    {"role": "assistant", "content": "It is 4"},
]


def check_template(template: str, renderer: ChatRenderer, tokenizer: Tokenizer, name: str) -> int:
    """Check a template and return the id of its end-of-turn token, the last token of every response.

    name: of the template in error messages.
    Raises UserError if the template fails, does not mark responses, begins them elsewhere than where the generation
    prompt ends, writes today's date, or needs special tokens that the tokenizer lacks.
    """
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    _check_markers(template, special, name)
    if "strftime_now" in template:
        raise UserError(f"{name} writes today's date, so tokens would change by the day: give a copy without it")
    try:
        rendered = renderer.render(PROBE)
    except Exception as error:  # a template is a program: it can fail in any way
        raise UserError(
            f"{name} cannot render a chat ({type(error).__name__}: {error}): correct the template"
        ) from error
    _check_spans(rendered, name)
    _check_prompts(rendered, renderer, name)
    return _find_end_of_turn(rendered, tokenizer, special, name)


def _check_markers(template: str, special: set[str], name: str) -> None:
    missing = [marker for marker in CHATML_MARKERS if marker in template and marker not in special]
    if missing:
        raise UserError(
            f"{name} writes {' and '.join(missing)}, which the tokenizer does not have as special tokens (a base "
            "tokenizer?): use the tokenizer of a chat model, or rename reserved tokens of this one in tokenizer.json"
        )


def _check_spans(rendered: RenderedChat, name: str) -> None:
    responses = [rendered.text[start:end] for start, end in rendered.responses]
    expected = [message["content"] for message in PROBE if message["role"] == "assistant"]
    if len(responses) != len(expected) or not all(map(str.__contains__, responses, expected)):
        raise UserError(
            f"{name} does not mark the assistant's responses (found {len(responses)} of {len(expected)}): put "
            "{% generation %} ... {% endgeneration %} around what the assistant writes, end of turn included, or use "
            "data.prepare.chat_template=chatml"
        )


def _check_prompts(rendered: RenderedChat, renderer: ChatRenderer, name: str) -> None:
    places = [place for place, message in enumerate(PROBE) if message["role"] == "assistant"]
    for place, (start, _) in zip(places, rendered.responses, strict=True):
        before, prompt = rendered.text[:start], renderer.render_prompt(PROBE[:place])
        if before != prompt:
            raise UserError(
                f"{name} marks responses after {before[-40:]!r}, but its generation prompt ends with {prompt[-40:]!r}: "
                "decoding would meet other prompts than training; begin {% generation %} where the prompt ends"
            )


def _find_end_of_turn(rendered: RenderedChat, tokenizer: Tokenizer, special: set[str], name: str) -> int:
    responses = [rendered.text[start:end] for start, end in rendered.responses]
    last = {encoding.ids[-1] for encoding in tokenizer.encode_batch_fast(responses, add_special_tokens=False)}
    token_id = last.pop()
    if last or tokenizer.id_to_token(token_id) not in special:
        raise UserError(
            f"{name} does not end responses with one end-of-turn token of this tokenizer (the first ends with "
            f"{responses[0][-20:]!r}): put that token, and nothing after it, before {{% endgeneration %}}"
        )
    return token_id

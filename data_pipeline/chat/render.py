"""A chat as text, cut where the assistant's answers begin and end."""

from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from data_pipeline.chat.messages import Message
from data_pipeline.prepare.encoders import Skip


@dataclass(frozen=True)
class RenderedChat:
    """text: the whole chat. answers: [start, end) characters of what stands in `{% generation %}` tags, in order."""

    text: str
    answers: list[tuple[int, int]]


class ChatRenderer:
    """Renders with one template, as transformers' apply_chat_template does (which compiles it once per process).

    template: its text. template_tokens: special tokens it can name ({"bos_token": "<s>"}).
    """

    def __init__(self, template: str, template_tokens: dict[str, str]) -> None:
        self._template = template
        self._template_tokens = template_tokens

    def render(self, messages: list[Message]) -> RenderedChat:
        """The complete chat. Raises whatever the template raises."""
        texts, answers = self._call(messages, return_assistant_tokens_mask=True)
        return RenderedChat(texts[0], answers[0])

    def render_prompt(self, messages: list[Message]) -> str:
        """What decoding starts from: the chat and the beginning of the assistant's next turn."""
        texts, _ = self._call(messages, add_generation_prompt=True)
        return texts[0]

    def split(self, messages: list[Message]) -> list[str] | Skip:
        """Texts of context, answer, context, answer, ...; what follows the last answer is left out.

        A chat of which the template refuses, drops or rewrites a part gives the reason instead.
        """
        try:
            rendered = self.render(messages)
        except Exception as error:  # a template is a program: it can fail in any way
            return Skip("refused by the chat template", f"{type(error).__name__}: {error}")
        assistants = [message for message in messages if message["role"] == "assistant"]
        segments = _cut(rendered)
        if len(rendered.answers) != len(assistants) or not all(segments):
            return Skip("answers not marked by the chat template")
        for message, answer in zip(assistants, segments[1::2], strict=True):
            if missing := _find_missing(message, answer):
                return Skip("part of an answer not rendered by the chat template", missing)
        for message in messages:
            if message["content"].strip() not in rendered.text:
                return Skip("message not rendered by the chat template", f"role {message['role']}")
        return segments

    def _call(self, messages: list[Message], **settings: bool) -> tuple[list[str], list[list[tuple[int, int]]]]:
        arguments: dict[str, Any] = {**self._template_tokens, **settings}
        return render_jinja_template([messages], chat_template=self._template, **arguments)  # type: ignore[return-value]


def _cut(rendered: RenderedChat) -> list[str]:
    segments, position = [], 0
    for start, end in rendered.answers:
        segments += [rendered.text[position:start], rendered.text[start:end]]
        position = end
    return segments


def _find_missing(message: Message, answer: str) -> str:
    """The part of an assistant's message that its answer lacks, or nothing. Templates may trim white space."""
    if message["content"].strip() not in answer:
        return "content"
    if message.get("reasoning_content", "").strip() not in answer:
        return "thinking"
    names = [(call.get("function") or call)["name"] for call in message.get("tool_calls", [])]
    return "" if all(name in answer for name in names) else "tool calls"

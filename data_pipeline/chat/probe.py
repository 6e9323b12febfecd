"""Checking a template and a tokenizer before the first row, on a chat of our own."""

from tokenizers import Tokenizer

from conf.system.errors import UserError
from data_pipeline.chat.messages import Message
from data_pipeline.chat.render import ChatRenderer, RenderedChat
from data_pipeline.chat.template import CHATML_MARKERS

PROBE: list[Message] = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And how is that spelled in digits?"},
    {"role": "assistant", "content": "It is 4"},
]


def check_template(template: str, renderer: ChatRenderer, tokenizer: Tokenizer, name: str) -> int:
    """Id of the end-of-turn token: the last token of every answer.

    name: what messages call the template.
    Raises UserError if the template fails, does not mark answers, gives answers another context than the generation
    prompt, writes today's date, or needs special tokens that the tokenizer lacks.
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
    _check_contexts(rendered, renderer, name)
    return _find_end_of_turn(rendered, tokenizer, special, name)


def _check_markers(template: str, special: set[str], name: str) -> None:
    missing = [marker for marker in CHATML_MARKERS if marker in template and marker not in special]
    if missing:
        raise UserError(
            f"{name} writes {' and '.join(missing)}, which the tokenizer does not have as special tokens (a base "
            "tokenizer?): use the tokenizer of a chat model, or rename reserved tokens of this one in tokenizer.json"
        )


def _check_spans(rendered: RenderedChat, name: str) -> None:
    answers = [rendered.text[start:end] for start, end in rendered.answers]
    expected = [message["content"] for message in PROBE if message["role"] == "assistant"]
    if len(answers) != len(expected) or not all(text in answer for text, answer in zip(expected, answers, strict=True)):
        raise UserError(
            f"{name} does not mark the assistant's answers (found {len(answers)} of {len(expected)}): put "
            "{% generation %} ... {% endgeneration %} around what the assistant writes, end of turn included, or use "
            "data.prepare.chat_template=chatml"
        )


def _check_contexts(rendered: RenderedChat, renderer: ChatRenderer, name: str) -> None:
    places = [place for place, message in enumerate(PROBE) if message["role"] == "assistant"]
    for place, (start, _) in zip(places, rendered.answers, strict=True):
        context, prompt = rendered.text[:start], renderer.render_prompt(PROBE[:place])
        if context != prompt:
            raise UserError(
                f"{name} marks answers after {context[-40:]!r}, but its generation prompt ends with {prompt[-40:]!r}: "
                "decoding would meet other prompts than training; begin {% generation %} where the prompt ends"
            )


def _find_end_of_turn(rendered: RenderedChat, tokenizer: Tokenizer, special: set[str], name: str) -> int:
    answers = [rendered.text[start:end] for start, end in rendered.answers]
    last = {encoding.ids[-1] for encoding in tokenizer.encode_batch_fast(answers, add_special_tokens=False)}
    token_id = last.pop()
    if last or tokenizer.id_to_token(token_id) not in special:
        raise UserError(
            f"{name} does not end answers with one end-of-turn token of this tokenizer (the first ends with "
            f"{answers[0][-20:]!r}): put that token, and nothing after it, before {{% endgeneration %}}"
        )
    return token_id

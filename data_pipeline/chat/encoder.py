"""Encode chats. Imported by worker processes, so it must not import torch."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from conf.tokenizer_info import read_tokenizer_info
from data_pipeline.chat.messages import Message, Tool, find_reserved_tokens, read_chat, read_tools
from data_pipeline.chat.render import ChatRenderer, check_template
from data_pipeline.chat.template import describe_chat_template, load_chat_template, read_template_tokens
from data_pipeline.encoder import DocumentTokens, Skip, load_tokenizer


class ChatEncoder:
    """Encodes a chat as prompt, response, prompt, response, ... (see data_pipeline.encoder.RecordEncoder).

    A prompt ends with the generation prompt, a response with its end-of-turn token. Every segment is encoded on its
    own, so no token spans the boundary between a prompt and what decoding adds to it.

    Raises UserError as check_template does.
    """

    def __init__(
        self, tokenizer: Tokenizer, mask_token: str, template: str, template_tokens: dict[str, str], name: str
    ) -> None:
        tokenizer.encode_special_tokens = False  # markers that the template writes are tokens
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._template_tokens = template_tokens
        self._renderer = ChatRenderer(template, template_tokens)
        self._reserved = find_reserved_tokens(tokenizer, mask_token)
        self.block_padding_token_id = check_template(template, self._renderer, tokenizer, name)

    def encode(self, values: Sequence[object]) -> list[DocumentTokens | Skip]:
        """Encode chats; see RecordEncoder."""
        chats = [self._split(value) for value in values]
        segments = iter(self.tokenize([text for chat in chats if not isinstance(chat, Skip) for text in chat]))
        return [chat if isinstance(chat, Skip) else [next(segments) for _ in chat] for chat in chats]

    def read(self, value: object) -> tuple[list[Message], list[Tool]] | Skip:
        """Return the checked messages and tools of a record's value; see read_chat and read_tools."""
        messages, tools = read_chat(value, self._reserved), read_tools(value, self._reserved)
        if isinstance(messages, Skip):
            return messages
        return tools if isinstance(tools, Skip) else (messages, tools)

    def render(self, messages: list[Message], tools: Sequence[Tool]) -> list[str] | Skip:
        """Return the texts of prompt, response, prompt, response, ...; see ChatRenderer.split."""
        return self._renderer.split(messages, tools)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def settings(self) -> dict:
        """Return the settings; see RecordEncoder.

        chat_template: in full, as an instruct checkpoint needs it. template_tokens: texts that the template inserts by
        name.
        """
        return {"chat_template": self._template, "template_tokens": self._template_tokens}

    def _split(self, value: object) -> list[str] | Skip:
        chat = self.read(value)
        return chat if isinstance(chat, Skip) else self.render(*chat)


def build_chat_encoder(tokenizer_dir: Path, mask_token: str, chat_template: str | None) -> ChatEncoder:
    """Build the encoder of the Hugging Face tokenizer in `tokenizer_dir`.

    chat_template: null is the tokenizer's own, `chatml` the packaged one, else the path of a jinja file.
    Raises UserError for a directory that is no tokenizer's, and as load_chat_template and check_template do.
    """
    read_tokenizer_info(tokenizer_dir, mask_token)  # for its errors
    return ChatEncoder(
        load_tokenizer(tokenizer_dir),
        mask_token,
        load_chat_template(tokenizer_dir, chat_template),
        read_template_tokens(tokenizer_dir),
        describe_chat_template(tokenizer_dir, chat_template),
    )

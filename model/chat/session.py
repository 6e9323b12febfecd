"""One conversation: its messages, and how the next response is decoded and streamed. Knows nothing of terminals."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TextStreamer

from conf.system.errors import UserError
from model.chat.chat_model import ChatModel
from model.commands.decoding_options import choose_threshold
from model.commands.prompt_images import IMAGE_START_TEXT, expand_images, open_images
from model.commands.prompt_records import check_text
from model.export.images import PromptImage, load_pixels
from model.export.load import find_think_ids
from model.hf.decoding import decode
from model.hf.image_tokens import count_image_tokens
from model.hf.options import MODES, DecodeOptions


@dataclass(frozen=True)
class ChatOptions:
    """How responses are decoded; None takes the default of the shipped DecodeOptions.

    Attributes:
        mode: one of MODES.
        max_new_tokens: most tokens of one response, the end of turn included.
        temperature: as in DecodeOptions, and so are the other fields.
    """

    mode: str
    max_new_tokens: int
    temperature: float = 0.0
    block_length: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    threshold: float | None = None
    mask_groups: int | None = None
    thinking_budget: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Return fields of DecodeOptions, without max_new_tokens, which depends on the prompt."""
        own = {"mode", "max_new_tokens"}
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in own}
        return given | {"threshold": choose_threshold(self.mode, self.threshold)}


@dataclass(frozen=True)
class ChatResponse:
    """One finished response.

    Attributes:
        text: without the stop token.
        mode: the mode that decoded it.
        new_tokens: number of tokens, the stop token included.
        num_forwards: model calls, the prefill included.
        seconds: decoding time, the prefill included.
        stopped: `eos` or `length`.
    """

    text: str
    mode: str
    new_tokens: int
    num_forwards: int
    seconds: float
    stopped: str

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per model call; 1 in mode ar."""
        return self.new_tokens / self.num_forwards

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding."""
        return self.new_tokens / self.seconds


class ChatSession:
    """A conversation with a model. `options` may be replaced between responses."""

    def __init__(self, chat_model: ChatModel, options: ChatOptions, system: str | None = None):
        """Begin a conversation.

        Args:
            chat_model: the loaded checkpoint.
            options: how responses are decoded.
            system: text of a system message, which survives a reset.

        Raises:
            UserError: `system` is empty, or there is a thinking budget and the tokenizer has no <think>.
        """
        self.options = options
        self._chat_model = chat_model
        self._opening = [] if system is None else [{"role": "system", "content": check_text(system, "--system")}]
        self.reset()
        self._find_think_ids()  # before the first question

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._opening)
        self._images: list[PromptImage] = []  # of all messages
        self.attached: list[PromptImage] = []  # those that the next message begins with

    def attach(self, source: str) -> str:
        """Let the next message begin with an image; describe it. Raises: UserError if it or the checkpoint cannot."""
        (image,) = open_images([source], Path(), "the message", self._chat_model.read_image)
        self.attached.append(image)
        height, width = image.grid
        return f"{source}: {height} x {width} features, {count_image_tokens(image.grid)} tokens"

    def set_mode(self, mode: str) -> None:
        """Decode further responses in another mode. Raises: UserError if there is no such mode."""
        if mode not in MODES:
            raise UserError(f"there is no mode {mode!r}: choose {', '.join(MODES)}")
        self.options = replace(self.options, mode=mode)

    def ask(self, prompt: str, write: Callable[[str], None] = lambda text: None) -> ChatResponse:
        """Respond to `prompt`, with what was attached, after all earlier messages; both join the conversation.

        After a KeyboardInterrupt the text written so far counts as the response; without any, the conversation is
        unchanged.

        Args:
            prompt: the user's message.
            write: receives text while it is decoded.

        Raises:
            UserError: the prompt cannot be rendered or is too long; the conversation is unchanged.
        """
        content = IMAGE_START_TEXT * len(self.attached) + check_text(prompt, "the prompt")
        messages, images = [*self.messages, {"role": "user", "content": content}], [*self._images, *self.attached]
        prompt_ids = self._render(messages, images)
        streamer = ResponseStreamer(self._chat_model.tokenizer, self._chat_model.stop_ids, write)
        try:
            response = self._decode(prompt_ids, images, streamer)
        except KeyboardInterrupt:
            streamer.end()
            if streamer.text:
                self._extend(messages, images, streamer.text)
            raise
        self._extend(messages, images, response.text)
        return response

    def _extend(self, messages: list[dict[str, str]], images: list[PromptImage], text: str) -> None:
        """Let a response join the conversation, with what it responds to."""
        self.messages = [*messages, {"role": "assistant", "content": text}]
        self._images, self.attached = images, []

    def _render(self, messages: list[dict[str, str]], images: list[PromptImage]) -> Tensor:
        """Return the token ids [1, P] of the conversation up to where the assistant begins to speak."""
        try:
            encoded: Any = self._chat_model.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template may raise anything
            raise UserError(f"the checkpoint's chat template rejects the messages: {error}") from None
        if self._chat_model.read_image is None:
            return encoded["input_ids"]
        return torch.tensor([expand_images(encoded["input_ids"][0].tolist(), images, "the conversation")])

    def _decode(self, prompt_ids: Tensor, images: list[PromptImage], streamer: "ResponseStreamer") -> ChatResponse:
        options, model, stop_ids = self.options, self._chat_model.model, self._chat_model.stop_ids
        decode_options = DecodeOptions(
            max_new_tokens=min(options.max_new_tokens, self._count_free_positions(prompt_ids)),
            eos_token_id=stop_ids,
            streamer=streamer,
            **options.arguments(),
            **self._find_think_ids(),
        )
        begin = time.perf_counter()
        try:
            embeds = model.embed_prompt(prompt_ids, **load_pixels(images))
            result = decode(model, options.mode, prompt_ids, decode_options.for_mode(options.mode), None, embeds)
        except torch.OutOfMemoryError:
            raise UserError("the device ran out of memory: shorten the conversation, or use --device cpu") from None
        except ValueError as error:  # only the model can judge some options and tokens
            raise UserError(f"{error}") from None
        seconds = time.perf_counter() - begin
        stopped = "eos" if int(result.output_ids[0, -1]) in stop_ids else "length"
        return ChatResponse(
            streamer.text, options.mode, result.num_new_tokens[0], result.num_forwards, seconds, stopped
        )

    def _find_think_ids(self) -> dict[str, Any]:
        """Return the further field of DecodeOptions that a thinking budget needs."""
        if self.options.thinking_budget is None:
            return {}
        return {"think_token_ids": find_think_ids(self._chat_model.tokenizer)}

    def _count_free_positions(self, prompt_ids: Tensor) -> int:
        """Return the positions left for the response. Raises: UserError if there are none."""
        length, limit = prompt_ids.shape[1], self._chat_model.model.config.max_position_embeddings
        if length >= limit:
            raise UserError(
                f"the conversation has {length} tokens, but the model only {limit} positions: shorten the prompt, "
                "or start a new conversation (/reset)"
            )
        return limit - length


class ResponseStreamer(TextStreamer):
    """Writes a response word by word, never a part of a character, and without the stop token.

    Other special tokens are written: `<think>` belongs to the response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_ids: tuple[int, ...], write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        self._stop_ids, self._write = stop_ids, write
        self._shown_ids: list[int] = []

    @property
    def text(self) -> str:
        """The whole response so far."""
        return str(self.tokenizer.decode(self._shown_ids, **self.decode_kwargs))

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, P] first, then new tokens [n]."""
        if not self.next_tokens_are_prompt:
            shown = [token for token in value.tolist() if token not in self._stop_ids]
            self._shown_ids += shown
            value = torch.tensor(shown, dtype=torch.long)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write text that later tokens cannot change."""
        if text:
            self._write(text)

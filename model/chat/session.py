"""One conversation: its messages, and how the next answer is decoded. Knows nothing of terminals."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conf.system.errors import UserError
from model.chat.load import ChatModel
from model.chat.options import ChatOptions, check_text
from model.chat.stream import AnswerStreamer
from model.export.load import find_think_ids
from model.hf.decoding import decode
from model.hf.options import MODES, DecodeOptions


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    text: without the stop token. new_tokens: with it. num_forwards: model calls, the prefill included.
    seconds: of decoding, the prefill included. stopped: `eos` or `length`.
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
    """A conversation with a model. `options` may be exchanged between answers."""

    def __init__(self, chat_model: ChatModel, options: ChatOptions, system: str | None = None):
        """system: text of a system message that stays when the conversation is reset.

        Raises: UserError if that is no text, or if there is a thinking budget and the tokenizer has no <think>.
        """
        self.options = options
        self._chat_model = chat_model
        self._opening = [] if system is None else [{"role": "system", "content": check_text(system, "--system")}]
        self.messages = list(self._opening)
        self._find_think_ids()  # before the first question

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._opening)

    def set_mode(self, mode: str) -> None:
        """Decode further answers in another mode. Raises: UserError if there is no such mode."""
        if mode not in MODES:
            raise UserError(f"there is no mode {mode!r}: choose {', '.join(MODES)}")
        self.options = replace(self.options, mode=mode)

    def ask(self, prompt: str, write: Callable[[str], None] = lambda text: None) -> Answer:
        """The answer to `prompt`, after all messages before; both join the conversation.

        write: gets the text in pieces while it is decoded. After a KeyboardInterrupt what has been written so far
        counts as the answer; without any the conversation is as it was.

        Raises: UserError if the prompt cannot be rendered or is too long; the conversation is then as it was.
        """
        messages = [*self.messages, {"role": "user", "content": check_text(prompt, "the prompt")}]
        prompt_ids = self._render(messages)
        streamer = AnswerStreamer(self._chat_model.tokenizer, self._chat_model.stop_ids, write)
        try:
            answer = self._decode(prompt_ids, streamer)
        except KeyboardInterrupt:
            streamer.end()
            if streamer.text:
                self.messages = [*messages, {"role": "assistant", "content": streamer.text}]
            raise
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def _render(self, messages: list[dict[str, str]]) -> Tensor:
        """Token ids [1, P] of the conversation up to where the assistant begins to speak."""
        try:
            encoded: Any = self._chat_model.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # whatever a template raises
            raise UserError(f"the checkpoint's chat template rejects the messages: {error}") from None
        return encoded["input_ids"]

    def _decode(self, prompt_ids: Tensor, streamer: AnswerStreamer) -> Answer:
        options, model, stop_ids = self.options, self._chat_model.model, self._chat_model.stop_ids
        decode_options = DecodeOptions(
            max_new_tokens=min(options.max_new_tokens, self._room_behind(prompt_ids)),
            eos_token_id=stop_ids,
            streamer=streamer,
            **options.arguments(),
            **self._find_think_ids(),
        )
        begin = time.perf_counter()
        try:
            result = decode(model, options.mode, prompt_ids, decode_options)
        except torch.OutOfMemoryError:
            raise UserError("the device ran out of memory: shorten the conversation, or use --device cpu") from None
        except ValueError as error:  # options or tokens that only the model can judge
            raise UserError(f"{error}") from None
        seconds = time.perf_counter() - begin
        stopped = "eos" if int(result.output_ids[0, -1]) in stop_ids else "length"
        return Answer(streamer.text, options.mode, result.num_new_tokens[0], result.num_forwards, seconds, stopped)

    def _find_think_ids(self) -> dict[str, Any]:
        """The field of DecodeOptions that a thinking budget needs beside it."""
        if self.options.thinking_budget is None:
            return {}
        return {"think_token_ids": find_think_ids(self._chat_model.tokenizer)}

    def _room_behind(self, prompt_ids: Tensor) -> int:
        """Positions left for the answer. Raises: UserError if there are none."""
        length, limit = prompt_ids.shape[1], self._chat_model.model.config.max_position_embeddings
        if length >= limit:
            raise UserError(
                f"the conversation has {length} tokens, the model no more than {limit} positions: shorten the prompt, "
                "or begin anew (/reset)"
            )
        return limit - length

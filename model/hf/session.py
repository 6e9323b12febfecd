"""A decode opened for a mode to run: checked prompts, the model with its cache, rules for tokens, and the result.

Shapes: B sequences, P tokens of the longest prompt, T new tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .cache import CachedModel, PromptEmbeddings, align_embeddings
from .options import (
    DecodeOptions,
    DecodeResult,
    check_effect,
    check_options,
    check_stop_ids,
    resolve_block_length,
    resolve_end_think,
    resolve_mask_token_id,
    resolve_stop_ids,
)
from .sampling import Draft, DraftVerification, Sampler, ThinkingBudget, make_generator

FIRST_CAPACITY = 1024  # new tokens that the cache has room for at first; it doubles when it is full


@dataclass(frozen=True)
class PromptBatch:
    """Checked prompts on the model's device.

    Attributes:
        given: [B, P] as the caller has them, padded on the left.
        tokens: [B, P without common padding], padded on the right with the sequence's last token. A sequence then
            begins at slot 0 of the cache, and its padding lies where its first new tokens will be written.
        lengths: of each sequence without padding, at least 1.
        embeddings: of `tokens`, where they are not those of the ids.
    """

    given: Tensor
    tokens: Tensor
    lengths: list[int]
    embeddings: PromptEmbeddings | None = None

    @property
    def is_ragged(self) -> bool:
        """Whether the prompts differ in length."""
        return min(self.lengths) < self.tokens.shape[1]


def select_prompts(prompt_ids: Tensor | None, input_ids: Tensor | None) -> Tensor:
    """Return the prompts, which may be given under either name; raise ValueError for both or neither."""
    if prompt_ids is not None and input_ids is None:
        return prompt_ids
    if input_ids is not None and prompt_ids is None:
        return input_ids
    raise ValueError("give the prompts once, as prompt_ids or as input_ids")


def prepare_prompts(
    model: Any,
    prompt_ids: Tensor,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None = None,
    *,
    mask_token_id: int,
    max_new_tokens: int,
) -> PromptBatch:
    """Check prompt_ids [B, P], attention_mask [B, P], zero on left padding, and inputs_embeds [B, P, hidden].

    Raises:
        ValueError: no token ids of the vocabulary, a mask token among them, an empty prompt, padding elsewhere than on
            the left, embeddings of another shape, or a context that prompt and new tokens overflow.
    """
    mask = read_padding_mask(prompt_ids, attention_mask)
    lengths: list[int] = mask.sum(1).tolist()
    _check_tokens(prompt_ids, mask, model.config.vocab_size, mask_token_id)
    longest, limit, width = max(lengths), model.config.max_position_embeddings, prompt_ids.shape[1]
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's {limit} positions: "
            "shorten the prompt or lower max_new_tokens"
        )
    slots = torch.arange(longest, device=prompt_ids.device) + (width - mask.sum(1, keepdim=True))
    tokens = prompt_ids.gather(1, slots.clamp(max=width - 1))
    weight = model.get_input_embeddings().weight
    embeddings = None if inputs_embeds is None else align_embeddings(inputs_embeds, slots, width, weight)
    return PromptBatch(prompt_ids.to(weight.device), tokens.to(weight.device).long(), lengths, embeddings)


def read_padding_mask(prompt_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return where prompt_ids [B, P] hold tokens [B, P]. Raises: ValueError, as prepare_prompts."""
    if not isinstance(prompt_ids, Tensor) or prompt_ids.dim() != 2 or prompt_ids.is_floating_point():
        got = f"{prompt_ids.dtype} {list(prompt_ids.shape)}" if isinstance(prompt_ids, Tensor) else type(prompt_ids)
        raise ValueError(f"prompt_ids must be token ids [batch, length], got {got}")
    if prompt_ids.numel() == 0:
        raise ValueError(
            f"prompt_ids is empty {list(prompt_ids.shape)}: give at least one token, such as the bos token"
        )
    mask = torch.ones_like(prompt_ids) if attention_mask is None else attention_mask.to(prompt_ids.device)
    _check_padding(prompt_ids, mask != 0)
    return mask != 0


def _check_padding(prompt_ids: Tensor, mask: Tensor) -> None:
    if mask.shape != prompt_ids.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, prompt_ids {list(prompt_ids.shape)}: they must agree")
    if not bool(mask.any(1).all()):
        index = int(mask.any(1).long().argmin())
        raise ValueError(f"prompt {index} of prompt_ids is empty, all of it padding: give at least one token")
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        index = int((mask[:, :-1] & ~mask[:, 1:]).any(1).long().argmax())
        raise ValueError(
            f"prompt {index} of attention_mask has zeros after a token: pad on the left "
            "(tokenizer.padding_side = 'left')"
        )


def _check_tokens(prompt_ids: Tensor, mask: Tensor, vocab_size: int, mask_token_id: int) -> None:
    tokens = prompt_ids[mask]
    low, high = (int(limit) for limit in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"prompt_ids holds id {low if low < 0 else high}, the vocabulary is 0..{vocab_size - 1}")
    masked = (prompt_ids == mask_token_id) & mask
    if bool(masked.any()):
        index, position = masked.nonzero()[0].tolist()
        raise ValueError(
            f"prompt_ids holds the mask token (id {mask_token_id}) in prompt {index} at index {position}: it stands "
            "for what is to be predicted and is no text; remove it"
        )


def cut_at_stop(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """Return the tokens up to and including the first stop id."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens


class TokenStream:
    """Hands final tokens to a streamer as transformers' `generate` does; does nothing without a streamer.

    The streamer's `put` gets the prompt [1, P] first, then new tokens [n] in their order, int64 on the CPU: together
    they are `output_ids`, the stop token included. `end` follows the last ones, though not after an exception.
    """

    def __init__(self, streamer: BaseStreamer | None, prompt_ids: Tensor, stop_ids: tuple[int, ...]):
        """Stream prompt_ids [B, P]; raise ValueError for several prompts, which one stream would mix up."""
        if streamer is not None and len(prompt_ids) != 1:
            raise ValueError(
                f"a streamer takes one prompt at a time, got {len(prompt_ids)}: call it per prompt, or leave it out"
            )
        self._streamer, self._stop_ids = streamer, stop_ids
        if streamer is not None:
            streamer.put(prompt_ids.cpu())

    def put(self, tokens: Tensor | Sequence[int]) -> None:
        """Stream final tokens ([1, N], or a list) up to and including the first stop id."""
        if self._streamer is None:
            return  # before anything moves to the host
        values = tokens[0].tolist() if isinstance(tokens, Tensor) else list(tokens)
        self._streamer.put(torch.tensor(cut_at_stop(values, self._stop_ids), dtype=torch.long))

    def end(self) -> None:
        """Announce that nothing more follows."""
        if self._streamer is not None:
            self._streamer.end()


@dataclass(frozen=True)
class DecodeSession:
    """One opened decode. A mode reads the fields; `model`, `thinking` and `stream` advance by their own methods.

    Attributes:
        options: as given.
        prompt: the checked prompts.
        block_length: tokens of a block, its seed included.
        stop_ids: tokens that end a sequence; none: it never ends early.
        model: runs and counts the forwards.
        sampler: chooses tokens.
        thinking: closes thoughts that exceed their budget.
        stream: receives final tokens.
    """

    options: DecodeOptions
    prompt: PromptBatch
    block_length: int
    stop_ids: tuple[int, ...]
    model: CachedModel
    sampler: Sampler
    thinking: ThinkingBudget
    stream: TokenStream

    def prefill(self) -> Tensor:
        """Write the prompts to the cache and return the first tokens [B, 1]."""
        return self.choose_next(self.model.encode_context("prefill", self.prompt.tokens, self.prompt.lengths))

    def choose_next(self, hidden: Tensor) -> Tensor:
        """Choose the final tokens [B, 1] that follow hidden [B, 1, hidden]."""
        tokens = self.sampler.choose(self.thinking.force(self.model.project(hidden)))
        self.thinking.commit(tokens)
        return tokens

    def verify(self, logits: Tensor, draft: Draft) -> DraftVerification:
        """Verify a draft of M tokens by the logits [B, 1 + M, vocab] after its seed and tokens, changed in place."""
        logits = self.thinking.force(logits, draft.tokens)
        verification = self.sampler.verify(draft, logits)
        self.thinking.commit(verification.tokens, verification.num_accepted + 1)
        return verification

    def is_stop(self, tokens: Tensor) -> Tensor:
        """Return where tokens (any shape) hold a stop id."""
        found = torch.zeros_like(tokens, dtype=torch.bool)
        for stop_id in self.stop_ids:
            found |= tokens == stop_id
        return found

    def finish(
        self,
        new_tokens: Tensor,
        num_proposed: int = 0,
        num_committed: int | Tensor = 0,
        acceptance_lengths: Sequence[int] = (),
    ) -> DecodeResult:
        """Cut new_tokens [B, T] after each sequence's first stop token and put the result together."""
        self.stream.end()
        stops = self.is_stop(new_tokens).long()
        after_stop = stops.cumsum(1) - stops > 0
        num_new_tokens: list[int] = (~after_stop).sum(1).tolist()
        if self.stop_ids:
            new_tokens = new_tokens.masked_fill(after_stop, self.stop_ids[0])[:, : max(num_new_tokens)]
        given = self.prompt.given
        return DecodeResult(
            output_ids=torch.cat((given, new_tokens.to(given.dtype)), dim=1),
            num_new_tokens=num_new_tokens,
            forwards=dict(self.model.forwards),
            num_positions=self.model.num_positions,
            num_proposed=num_proposed,
            num_committed=int(num_committed),
            acceptance_lengths=list(acceptance_lengths),
        )


def open_session(
    model: Any,
    mode: str,
    prompt_ids: Tensor,
    attention_mask: Tensor | None,
    options: DecodeOptions,
    inputs_embeds: Tensor | None = None,
    largest_forward: int | None = None,
) -> DecodeSession:
    """Check everything that was asked for and open a decode; the prompt is streamed.

    Args:
        model: a NemotronLabsDiffusionModel.
        mode: one of MODES.
        prompt_ids: [B, P].
        attention_mask: [B, P] with zeros on left padding, or None.
        options: of the decode.
        inputs_embeds: [B, P, hidden] in place of the embeddings of prompt_ids, or None.
        largest_forward: tokens that need room after the cached ones; None: a block.

    Raises:
        ValueError: prompts or options that cannot be decoded, options without effect, several prompts for a streamer.
    """
    config = model.config
    check_options(config, options)
    check_effect(mode, options)
    mask_token_id = resolve_mask_token_id(config, options.mask_token_id)
    stop_ids = resolve_stop_ids(model, options.eos_token_id)
    check_stop_ids(stop_ids, config.vocab_size, mask_token_id)
    limits = {"mask_token_id": mask_token_id, "max_new_tokens": options.max_new_tokens}
    prompt = prepare_prompts(model, prompt_ids, attention_mask, inputs_embeds, **limits)
    block_length = resolve_block_length(config, options)
    room = min(options.max_new_tokens, FIRST_CAPACITY) + (largest_forward or block_length)
    cached_model = CachedModel(model, prompt.tokens.shape[1] + room, mask_token_id, prompt.embeddings)
    return DecodeSession(
        options,
        prompt,
        block_length,
        stop_ids,
        cached_model,
        Sampler(options.temperature, options.top_k, options.top_p, make_generator(options.seed, cached_model.device)),
        _open_thinking(options, prompt),
        TokenStream(options.streamer, prompt.given, stop_ids),
    )


def _open_thinking(options: DecodeOptions, prompt: PromptBatch) -> ThinkingBudget:
    """Begin to count thinking tokens, by whichever of the two budgets is given."""
    if options.max_thinking_tokens is not None:
        budget, open_id, close_id = options.max_thinking_tokens, None, resolve_end_think(options)
    else:
        budget, (open_id, close_id) = options.thinking_budget, options.think_token_ids
    return ThinkingBudget(budget, open_id, close_id, prompt.tokens, prompt.lengths)

"""What all decoding modes share: one counted forward, the cache, what has been emitted, the result."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .attention_mask import MaskBuilder, TokenLayout, make_causal_layout
from .cache import PrefixCache
from .layers import NO_ROWS, DraftAdapter
from .options import (
    DecodeOptions,
    check_options,
    check_stop_ids,
    resolve_block_length,
    resolve_mask_token_id,
    resolve_stop_ids,
)
from .sampling import Sampler, ThinkingBudget, make_generator

FIRST_CAPACITY = 1024  # tokens of room behind the prompt to begin with; the cache doubles when it is full


@dataclass(frozen=True)
class DecodeResult:
    """One finished decode.

    output_ids: [B, P + T], prompt and its padding included; a row that stopped early is filled up with the first
        stop id.
    num_new_tokens: of each row, up to and including its stop token.
    forwards: model calls by kind: prefill; step (AR); denoise, commit (block diffusion: one writes a full block and
        yields the next seed); draft, verify; draft_and_verify.
    num_rows: token rows that went through the layers, over all forwards and rows of the batch.
    num_proposed, num_committed: tokens predicted for masked positions, or drafted and verified; how many were kept.
    acceptance_lengths: tokens emitted by each draft-verify cycle, bonus included; empty without speculation.
    """

    output_ids: Tensor
    num_new_tokens: list[int]
    forwards: dict[str, int]
    num_rows: int
    num_proposed: int
    num_committed: int
    acceptance_lengths: list[int]

    @property
    def num_forwards(self) -> int:
        """Model calls, prefill, drafts, verifications and cache commits included."""
        return sum(self.forwards.values())

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of a row (mean over the batch) per model call; 1 for AR."""
        return sum(self.num_new_tokens) / len(self.num_new_tokens) / self.num_forwards

    @property
    def tokens_per_row(self) -> float:
        """New tokens per token row computed, prompts included."""
        return sum(self.num_new_tokens) / self.num_rows

    @property
    def commit_ratio(self) -> float | None:
        """Share of proposed tokens that were kept; None without proposals."""
        return self.num_committed / self.num_proposed if self.num_proposed else None

    @property
    def num_cycles(self) -> int:
        """Draft-verify cycles, of all rows."""
        return len(self.acceptance_lengths)

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens per draft-verify cycle; None without one."""
        return sum(self.acceptance_lengths) / self.num_cycles if self.acceptance_lengths else None


class DecodeSession:
    """One decode in progress: model, prompt, cache, rules for choosing tokens, and what it has cost."""

    def __init__(
        self,
        model: Any,
        prompt_ids: Tensor,
        attention_mask: Tensor | None,
        options: DecodeOptions,
        largest_forward: int | None = None,
    ):
        """prompt_ids [B, P]; attention_mask [B, P] with zeros on left padding, or None.

        largest_forward: tokens that need room behind what is cached; None: a block.

        Raises: ValueError for prompts or options that cannot be decoded.
        """
        config = model.config
        check_options(config, options)
        self.model = model
        self.options = options
        self.mask_token_id = resolve_mask_token_id(config, options.mask_token_id)
        self.stop_ids = resolve_stop_ids(model, options.eos_token_id)
        check_stop_ids(self.stop_ids, config.vocab_size, self.mask_token_id)
        self.block_length = resolve_block_length(config, options)
        self.prompt: Prompt = prepare_prompt(
            model,
            prompt_ids,
            attention_mask,
            mask_token_id=self.mask_token_id,
            max_new_tokens=options.max_new_tokens,
        )
        self.stream = TokenStream(options.streamer, self.prompt.given)
        weight = model.get_input_embeddings().weight
        self.device = weight.device
        self.sampler = Sampler(
            options.temperature, options.top_k, options.top_p, make_generator(options.seed, self.device)
        )
        self.thinking = ThinkingBudget(
            options.thinking_budget, options.think_token_ids, self.prompt.tokens, self.prompt.lengths
        )
        # Compiled layers and captured graphs want the same shapes in every forward; elsewhere less work is better.
        self.fixed_shapes = self.device.type == "cuda"
        spare = self.block_length if largest_forward is None else largest_forward
        capacity = self.prompt.tokens.shape[1] + min(options.max_new_tokens, FIRST_CAPACITY) + spare
        self.cache = PrefixCache(config.num_hidden_layers, capacity, fixed_shapes=self.fixed_shapes)
        self._masks = MaskBuilder(config.num_attention_heads // config.num_key_value_heads, weight.dtype)
        self._positions = model.encoder.rotary.make_table(capacity, weight.dtype, self.device)
        self._adapter = DraftAdapter(model)
        self._layouts: dict[tuple[int, bool], TokenLayout] = {}
        self.forwards: Counter[str] = Counter()
        self.num_rows = self.num_proposed = 0
        self.num_committed: int | Tensor = 0

    @property
    def batch_size(self) -> int:
        """Rows decoded together."""
        return len(self.prompt.tokens)

    def layout(self, num_tokens: int, *, bidirectional: bool = False) -> TokenLayout:
        """The layout of num_tokens that follow each other; the same object for the same question."""
        key = (num_tokens, bidirectional or num_tokens == 1)
        if key not in self._layouts:
            self._layouts[key] = TokenLayout(num_tokens) if key[1] else make_causal_layout(num_tokens, self.device)
        return self._layouts[key]

    def encode(self, kind: str, tokens: Tensor, layout: TokenLayout, draft_rows: slice = NO_ROWS) -> Tensor:
        """Hidden states [B, N, hidden] of tokens [B, N] behind the cached prefix; what to keep is up to the caller.

        kind: of forward, for the count. draft_rows: those of N that the draft adapter, if there is one, applies to.
        """
        self.forwards[kind] += 1
        self.num_rows += tokens.numel()
        start = self.cache.length
        lengths = self.cache.begin(layout.num_tokens, self.device)
        visibility = self._masks.build(layout, lengths, self.cache.num_visible, self.cache.capacity)
        positions = self._encode_positions(layout, lengths, start)
        encoder = self.model.encoder
        return encoder(encoder.embed_tokens(tokens), positions, visibility, self.cache, self._adapter.on(draft_rows))

    def _encode_positions(self, layout: TokenLayout, lengths: Tensor | None, start: int) -> Any:
        if self._positions.num_positions < self.cache.capacity:
            self._positions = self.model.encoder.rotary.make_table(self.cache.capacity, self._masks.dtype, self.device)
        if lengths is None and layout.offsets is None:
            return self._positions.take_range(start, start + layout.num_tokens)
        offsets = (
            torch.arange(layout.num_tokens, device=self.device)[None] if layout.offsets is None else layout.offsets
        )
        return self._positions.take(offsets + (start if lengths is None else lengths))

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden [..., hidden], the mask token's at minus infinity."""
        logits = self.model.diffusion_head(hidden)
        logits.select(-1, self.mask_token_id).fill_(-torch.inf)
        return logits

    def prefill(self) -> Tensor:
        """Write the prompts to the cache; returns the first tokens [B, 1]."""
        hidden = self.encode_context("prefill", self.prompt.tokens, self.prompt.lengths)
        return self.choose_next(hidden)

    def encode_context(
        self, kind: str, tokens: Tensor, counts: Sequence[int] | None = None, *, bidirectional: bool = False
    ) -> Tensor:
        """Write tokens [B, N] to the cache, `counts` of each row (None: all); returns the last ones' hidden states.

        Those are [B, 1, hidden].
        """
        num_tokens = tokens.shape[1]
        layout = self.layout(num_tokens, bidirectional=bidirectional)
        if counts is None or min(counts) == num_tokens:
            hidden = self.encode(kind, tokens, layout)
            self.cache.advance(num_tokens)
            return hidden[:, -1:]
        ends = torch.tensor(counts, device=self.device)[:, None, None]
        if bidirectional:  # padding follows the tokens: a causal row does not see it, others must not
            visible = torch.arange(num_tokens, device=self.device) < ends
            layout = TokenLayout(num_tokens, visible=visible.expand(-1, num_tokens, -1), is_reused=False)
        hidden = self.encode(kind, tokens, layout)
        self.cache.advance(counts)
        return hidden.gather(1, (ends - 1).expand(-1, 1, hidden.shape[2]))

    def choose_next(self, hidden: Tensor) -> Tensor:
        """The verifier's tokens [B, 1] behind hidden [B, 1, hidden]; they are final."""
        tokens = self.sampler.choose(self.thinking.force(self.project(hidden)))
        self.thinking.keep(tokens)
        return tokens

    def finish(self, new_tokens: Tensor, acceptance_lengths: list[int]) -> DecodeResult:
        """Cut new_tokens [B, T] behind each row's first stop token and put the result together."""
        self.stream.end()
        stops = is_stop(new_tokens, self.stop_ids).long()
        behind = stops.cumsum(1) - stops > 0
        num_new_tokens: list[int] = (~behind).sum(1).tolist()
        if self.stop_ids:
            new_tokens = new_tokens.masked_fill(behind, self.stop_ids[0])[:, : max(num_new_tokens)]
        given = self.prompt.given
        return DecodeResult(
            torch.cat((given, new_tokens.to(given.dtype)), dim=1),
            num_new_tokens,
            dict(self.forwards),
            self.num_rows,
            self.num_proposed,
            int(self.num_committed),
            acceptance_lengths,
        )


@dataclass(frozen=True)
class Prompt:
    """Checked prompts on the model's device.

    given: [B, P] as the caller has them. tokens: [B, P], padded on the right with the row's last token.
    lengths: of each row without padding, at least 1.
    """

    given: Tensor
    tokens: Tensor
    lengths: list[int]

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in length."""
        return min(self.lengths) < self.tokens.shape[1]

    def last_tokens(self) -> Tensor:
        """[B, 1], the last token of each row."""
        return self.tokens[:, -1:]  # padding repeats it


def prepare_prompt(
    model: Any, prompt_ids: Tensor, attention_mask: Tensor | None, *, mask_token_id: int, max_new_tokens: int
) -> Prompt:
    """Check prompt_ids [B, P] and attention_mask [B, P], zero on left padding, or None.

    Raises:
        ValueError: no token ids of the vocabulary, a mask token among them, an empty prompt, padding elsewhere than on
            the left, or a context that prompt and new tokens overflow.
    """
    _check_ids(prompt_ids)
    mask = torch.ones_like(prompt_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    mask = mask.to(prompt_ids.device)
    _check_padding(prompt_ids, mask)
    lengths: list[int] = mask.sum(1).tolist()
    _check_tokens(prompt_ids, mask, model.config.vocab_size, mask_token_id)
    longest, limit = max(lengths), model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the model's {limit} positions: "
            "shorten the prompt or lower max_new_tokens"
        )
    width = prompt_ids.shape[1]
    slots = torch.arange(longest, device=prompt_ids.device) + (width - mask.sum(1, keepdim=True))
    tokens = prompt_ids.gather(1, slots.clamp(max=width - 1))
    device = model.get_input_embeddings().weight.device
    return Prompt(prompt_ids.to(device), tokens.to(device), lengths)


def _check_ids(prompt_ids: Tensor) -> None:
    if not isinstance(prompt_ids, Tensor) or prompt_ids.dim() != 2 or prompt_ids.is_floating_point():
        got = f"{prompt_ids.dtype} {list(prompt_ids.shape)}" if isinstance(prompt_ids, Tensor) else type(prompt_ids)
        raise ValueError(f"prompt_ids must be token ids [batch, length], got {got}")
    if prompt_ids.numel() == 0:
        raise ValueError(
            f"prompt_ids is empty {list(prompt_ids.shape)}: give at least one token, such as the bos token"
        )


def _check_padding(prompt_ids: Tensor, mask: Tensor) -> None:
    if mask.shape != prompt_ids.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, prompt_ids {list(prompt_ids.shape)}: they must agree")
    if not bool(mask.any(1).all()):
        row = int(mask.any(1).long().argmin())
        raise ValueError(f"row {row} of prompt_ids is empty, all of it padding: give at least one token")
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        row = int((mask[:, :-1] & ~mask[:, 1:]).any(1).long().argmax())
        raise ValueError(
            f"row {row} of attention_mask has zeros behind a token: pad on the left (tokenizer.padding_side = 'left')"
        )


def _check_tokens(prompt_ids: Tensor, mask: Tensor, vocab_size: int, mask_token_id: int) -> None:
    tokens = prompt_ids[mask]
    low, high = (int(limit) for limit in tokens.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"prompt_ids holds id {low if low < 0 else high}, the vocabulary is 0..{vocab_size - 1}")
    masked = (prompt_ids == mask_token_id) & mask
    if bool(masked.any()):
        row, position = masked.nonzero()[0].tolist()
        raise ValueError(
            f"prompt_ids holds the mask token (id {mask_token_id}) in row {row} at index {position}: it stands for "
            "what is to be predicted and is no text; remove it"
        )


class TokenStream:
    """What a decode has committed, as transformers' `generate` streams it; does nothing without a streamer.

    The streamer's `put` gets the prompt [1, P] first, then new tokens [n] in their order, int64 on the CPU: put
    together they are `output_ids`, the stop token included. `end` follows the last ones; not after an exception.
    """

    def __init__(self, streamer: BaseStreamer | None, prompt_ids: Tensor):
        """prompt_ids [B, P]. Raises ValueError for several rows: they would be mixed up in one stream."""
        if streamer is not None and len(prompt_ids) != 1:
            raise ValueError(
                f"a streamer takes one prompt at a time, got {len(prompt_ids)}: call it per prompt, or leave it out"
            )
        self._streamer = streamer
        if streamer is not None:
            streamer.put(prompt_ids.cpu())

    def put(self, tokens: Tensor | Sequence[int], stop_ids: tuple[int, ...]) -> None:
        """Stream committed tokens ([1, N], or a list) up to and including the first stop id."""
        if self._streamer is None:
            return  # before anything moves to the host
        values = tokens[0].tolist() if isinstance(tokens, Tensor) else list(tokens)
        self._streamer.put(torch.tensor(cut_at_stop(values, stop_ids), dtype=torch.long))

    def end(self) -> None:
        """Nothing more follows."""
        if self._streamer is not None:
            self._streamer.end()


def cut_at_stop(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """The tokens up to and including the first stop id."""
    for index, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens


def is_stop(tokens: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """Bool, where tokens (any shape) hold a stop id."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for stop_id in stop_ids:
        found |= tokens == stop_id
    return found

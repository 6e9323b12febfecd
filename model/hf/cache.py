"""The keys and values of the tokens decoded so far, and the forwards of a decode that read and extend them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention_mask import MaskBuilder, TokenLayout, make_causal_layout
from .layers import NO_POSITIONS, DraftAdapter
from .rope import PositionEncoding


class PrefixCache:
    """Preallocated keys and values, one pair of buffers per layer, with a length per sequence.

    Buffers are [B, key_value_heads, capacity, head_dim]; slot i of a sequence holds its i-th token, and only its first
    `lengths` slots count. A forward reserves the slots after them (`begin`), every layer writes its new tokens there
    (`update`), and `advance` commits as many as wanted: none of a draft, the accepted ones of a verification. The next
    forward overwrites the others. Buffers are allocated at first use and at least double when full. Where gradients
    flow, new tokens are concatenated instead of written in place.

    The names `update`, `get_seq_length` and `crop` are those of transformers' caches, so either kind can be given to
    the model's forward.
    """

    def __init__(self, num_layers: int, capacity: int = 0, *, fixed_shapes: bool = False):
        """Start empty.

        Args:
            num_layers: of the model.
            capacity: tokens to make room for at first use.
            fixed_shapes: after the first forward always show all slots, so that compiled layers see the same shapes
                again and again; a mask must then hide the slots that do not count.
        """
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._lengths = [0]
        self._fixed_shapes = fixed_shapes
        self._start = 0
        self._slots: Tensor | None = None
        self._keeps_graph = False
        self.capacity = capacity
        self.num_visible = 0

    @property
    def length(self) -> int:
        """Cached tokens of the longest sequence."""
        return max(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Cached tokens of each sequence; a single number while all are equally long."""
        return self._lengths

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences are equally long."""
        return len(self._lengths) == 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached tokens, which is the same for all layers."""
        return self.length

    def begin(self, num_new: int, device: torch.device, *, keeps_graph: bool = False) -> Tensor | None:
        """Reserve the slots of `num_new` tokens and set `num_visible`, the number of slots that `update` will show.

        keeps_graph: tokens with gradients will be committed.

        Returns:
            The lengths [B or 1, 1], or None if the new tokens take the same slots in all sequences.
        """
        self._keeps_graph = keeps_graph
        stop = self.length + num_new
        if stop > self.capacity:
            self.capacity = max(stop, 2 * self.capacity)
        self._start = self._lengths[0]
        if self.is_uniform and (not self._fixed_shapes or stop == num_new):
            self.num_visible, self._slots = stop, None
            return None
        self.num_visible = self.capacity if self._fixed_shapes else stop
        lengths = torch.tensor(self._lengths, device=device)[:, None]
        self._slots = (lengths + torch.arange(num_new, device=device))[:, None, :, None]
        return lengths

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write [B, heads, N, head_dim] to the reserved slots of a layer; return all visible slots, new included."""
        if _needs_gradient(key, value):
            assert self.is_uniform, "training decodes no ragged batches"
            keys, values = (
                self._concatenate(self._keys, key, layer_idx),
                self._concatenate(self._values, value, layer_idx),
            )
            if self._keeps_graph:  # else a layer that is recomputed must find what it found the first time
                self._keys[layer_idx], self._values[layer_idx] = keys, values
            return keys, values
        return self._write(self._keys, key, layer_idx), self._write(self._values, value, layer_idx)

    def advance(self, counts: int | Sequence[int]) -> None:
        """Commit the first `counts` tokens of the last forward: one number for all sequences, or one for each."""
        counts = [counts] if isinstance(counts, int) else list(counts)
        batch = max(len(counts), len(self._lengths))
        spread = [values * batch if len(values) == 1 else values for values in (self._lengths, counts)]
        self._set_lengths([length + count for length, count in zip(*spread, strict=True)])

    def crop(self, length: int) -> None:
        """Drop all but the first `length` tokens of each sequence; raise ValueError if there are fewer."""
        if not 0 <= length <= min(self._lengths):
            raise ValueError(f"cannot crop a cache of {min(self._lengths)} tokens to {length}")
        self._set_lengths([length])

    def _set_lengths(self, lengths: list[int]) -> None:
        self._lengths = lengths[:1] if min(lengths) == max(lengths) else lengths

    def _concatenate(self, buffers: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        buffer = buffers[layer]
        return new if buffer is None else torch.cat((buffer[:, :, : self._start], new), dim=2)

    def _write(self, buffers: list[Tensor | None], new: Tensor, layer: int) -> Tensor:
        buffer = buffers[layer]
        if buffer is None or buffer.shape[2] < self.capacity:
            buffer = buffers[layer] = self._grow(buffer, new)
        assert buffer.shape[0] == new.shape[0], "one cache serves one batch"
        if self._slots is None:
            buffer.narrow(2, self._start, new.shape[2]).copy_(new)
        else:
            buffer.scatter_(2, self._slots.expand_as(new), new)
        return buffer.narrow(2, 0, self.num_visible)

    def _grow(self, buffer: Tensor | None, like: Tensor) -> Tensor:
        """Return a buffer with room for `capacity` tokens that begins with the old one."""
        batch, heads, _, head_dim = like.shape
        # Zeros: a masked slot that was never written would spoil the sum with NaN x 0.
        grown = like.new_zeros(batch, heads, self.capacity, head_dim)
        if buffer is not None:
            grown[:, :, : buffer.shape[2]] = buffer
        return grown


def _needs_gradient(key: Tensor, value: Tensor) -> bool:
    """Return whether in-place writes would overwrite tensors that autograd has saved."""
    return torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)


def needs_fixed_shapes(device: torch.device) -> bool:
    """Return whether forwards should repeat their shapes, for compiled layers and captured graphs."""
    return device.type == "cuda"  # elsewhere computing only what is needed is faster


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the first tokens of a decode are embedded as, where token ids alone do not say it (images).

    Attributes:
        values: [B, P, hidden], padded on the right.
        counted: [B, P] bool, false on padding.
    """

    values: Tensor
    counted: Tensor

    def put_into(self, embedded: Tensor) -> None:
        """Replace the first tokens of embedded [B, N >= P, hidden], those that count."""
        first = embedded[:, : self.counted.shape[1]]
        first.copy_(torch.where(self.counted[..., None], self.values, first))


def align_embeddings(inputs_embeds: Tensor, slots: Tensor, width: int, weight: Tensor) -> PromptEmbeddings:
    """Move the embeddings of prompts padded on the left to the front.

    Args:
        inputs_embeds: [B, P, hidden].
        slots: [B, longest prompt], where each token of a prompt stands; P or more on padding.
        width: P.
        weight: of the token embedding [vocab, hidden], whose dtype and device the model computes in.

    Raises:
        ValueError: embeddings of another shape.
    """
    shape = (len(slots), width, weight.shape[1])
    if inputs_embeds.shape != shape:
        raise ValueError(f"inputs_embeds is {list(inputs_embeds.shape)}, prompts and model need {list(shape)}")
    index = slots.to(inputs_embeds.device)[..., None].clamp(max=width - 1).expand(-1, -1, shape[2])
    return PromptEmbeddings(inputs_embeds.gather(1, index).to(weight), (slots < width).to(weight.device))


class CachedModel:
    """A model with the cache of one decode. Every forward of the decode runs here and is counted.

    `forwards` (by kind) and `num_positions` (token positions that went through the layers) grow with each forward.
    """

    def __init__(self, model: Any, capacity: int, mask_token_id: int, prompt: PromptEmbeddings | None = None):
        """Begin with an empty cache.

        Args:
            model: a NemotronLabsDiffusionModel.
            capacity: tokens to make room for.
            mask_token_id: never predicted.
            prompt: replaces the embeddings of the first tokens in the first forward.
        """
        weight = model.get_input_embeddings().weight
        config = model.config
        self.device: torch.device = weight.device
        self.mask_token_id = mask_token_id
        self.vocab_size: int = config.vocab_size
        self.fixed_shapes = needs_fixed_shapes(self.device)
        self.cache = PrefixCache(config.num_hidden_layers, capacity, fixed_shapes=self.fixed_shapes)
        self.forwards: Counter[str] = Counter()
        self.num_positions = 0
        self._model = model
        self._prompt = prompt
        self._masks = MaskBuilder(config.num_attention_heads // config.num_key_value_heads, weight.dtype)
        self._table = model.rotary.build_table(capacity, weight.dtype, self.device)
        self._adapter = DraftAdapter(model)
        self._layouts: dict[tuple[int, bool], TokenLayout] = {}

    def layout(self, num_tokens: int, *, bidirectional: bool = False) -> TokenLayout:
        """Return the layout of num_tokens consecutive tokens; the same object for the same arguments."""
        key = (num_tokens, bidirectional or num_tokens == 1)
        if key not in self._layouts:
            self._layouts[key] = TokenLayout(num_tokens) if key[1] else make_causal_layout(num_tokens, self.device)
        return self._layouts[key]

    def encode(self, kind: str, tokens: Tensor, layout: TokenLayout, drafting: slice = NO_POSITIONS) -> Tensor:
        """Compute the hidden states [B, N, hidden] of tokens [B, N] that follow the cached prefix; commit none of them.

        Args:
            kind: of forward, for the count.
            tokens: the new tokens.
            layout: of these tokens.
            drafting: those of N that a draft adapter, if there is one, applies to.
        """
        self.forwards[kind] += 1
        self.num_positions += tokens.numel()
        start = self.cache.length
        lengths = self.cache.begin(layout.num_tokens, self.device)
        visibility = self._masks.build(layout, lengths, self.cache.num_visible, self.cache.capacity)
        encoding = self._encode_positions(layout, lengths, start)
        embedded = self._model.encoder.embed_tokens(tokens)
        if self._prompt is not None and start == 0:
            self._prompt.put_into(embedded)
        return self._model.encoder(embedded, encoding, visibility, self.cache, self._adapter.on(drafting))

    def encode_context(
        self, kind: str, tokens: Tensor, counts: Sequence[int] | None = None, *, bidirectional: bool = False
    ) -> Tensor:
        """Commit tokens [B, N] to the cache and return the hidden states [B, 1, hidden] of the last ones.

        counts: how many tokens of each sequence count, the others being padding; None: all.
        """
        num_tokens = tokens.shape[1]
        layout = self.layout(num_tokens, bidirectional=bidirectional)
        if counts is None or min(counts) == num_tokens:
            hidden = self.encode(kind, tokens, layout)
            self.cache.advance(num_tokens)
            return hidden[:, -1:]
        ends = torch.tensor(counts, device=self.device)[:, None, None]
        if bidirectional:  # padding comes last: under causal attention no token sees it, here a mask must hide it
            visible = torch.arange(num_tokens, device=self.device) < ends
            layout = TokenLayout(num_tokens, visible=visible.expand(-1, num_tokens, -1), is_reused=False)
        hidden = self.encode(kind, tokens, layout)
        self.cache.advance(counts)
        return hidden.gather(1, (ends - 1).expand(-1, 1, hidden.shape[2]))

    def project(self, hidden: Tensor) -> Tensor:
        """Compute the logits [..., vocab] of hidden [..., hidden], minus infinity for the mask token."""
        logits = self._model.diffusion_head(hidden)
        logits.select(-1, self.mask_token_id).fill_(-torch.inf)
        return logits

    def _encode_positions(self, layout: TokenLayout, lengths: Tensor | None, start: int) -> PositionEncoding:
        if self._table.num_positions < self.cache.capacity:
            self._table = self._model.rotary.build_table(self.cache.capacity, self._masks.dtype, self.device)
        if lengths is None and layout.offsets is None:
            return self._table.take_range(start, start + layout.num_tokens)
        offsets = layout.offsets
        if offsets is None:
            offsets = torch.arange(layout.num_tokens, device=self.device)[None]
        return self._table.take(offsets + (start if lengths is None else lengths))

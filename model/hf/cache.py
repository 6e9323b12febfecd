"""Keys and values of the tokens decoded so far."""

from collections.abc import Sequence

import torch
from torch import Tensor


class PrefixCache:
    """Preallocated keys and values, one pair of buffers per layer, and how many tokens of each row count.

    Buffers are [B, key_value_heads, capacity, head_dim]; slot i of a row holds its i-th token, and only the first
    `lengths[row]` slots count. A forward begins by reserving the slots behind them (`begin`), every layer writes its
    new tokens there (`update`), and `advance` keeps as many as wanted: none of a draft, the accepted ones of a
    verification. What is not kept is overwritten by the next forward. Buffers are allocated at first use and at least
    double when full. Where gradients flow new tokens are concatenated instead of written in place.

    The names `update`, `get_seq_length` and `crop` are those of transformers' caches, so either kind can be given to
    the model's forward.
    """

    def __init__(self, num_layers: int, capacity: int = 0, *, fixed_shapes: bool = False):
        """capacity: tokens to make room for at first use.

        fixed_shapes: behind a prefix always show all slots, whatever counts, so that compiled layers see the same
            shapes again and again; a mask must then hide the rest.
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
        """Tokens cached, of the longest row."""
        return max(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens cached, by row; a single number while all rows are alike."""
        return self._lengths

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have the same length."""
        return len(self._lengths) == 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached; the same for all layers."""
        return self.length

    def begin(self, num_new: int, device: torch.device, *, keeps_graph: bool = False) -> Tensor | None:
        """Reserve the slots of `num_new` tokens; returns lengths [B or 1, 1] unless slots are the same in all rows.

        `num_visible` tells how many slots `update` will show. keeps_graph: tokens with gradients will be kept.
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
        """Write [B, heads, N, head_dim] to the reserved slots of a layer; returns all visible slots, new included."""
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
        """Keep the first `counts` tokens of the last forward, of all rows or of each."""
        counts = [counts] if isinstance(counts, int) else list(counts)
        rows = max(len(counts), len(self._lengths))
        spread = [values * rows if len(values) == 1 else values for values in (self._lengths, counts)]
        self._set_lengths([length + count for length, count in zip(*spread, strict=True)])

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row. Raises ValueError if there are fewer."""
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
        """A buffer with room for `capacity` tokens that begins with the old one."""
        batch, heads, _, head_dim = like.shape
        # Zeros, as a masked slot that was never written would still spoil the sum with NaN x 0.
        grown = like.new_zeros(batch, heads, self.capacity, head_dim)
        if buffer is not None:
            grown[:, :, : buffer.shape[2]] = buffer
        return grown


def _needs_gradient(key: Tensor, value: Tensor) -> bool:
    """In-place writes would spoil tensors that autograd has saved."""
    return torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)

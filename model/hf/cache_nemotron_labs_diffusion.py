"""Keys and values of the tokens decoded so far."""

import torch
from torch import Tensor


class PrefixCache:
    """Preallocated keys and values with a length, one pair of buffers per layer.

    Buffers are [B, key_value_heads, capacity, head_dim]; only the first `length` tokens count. They are allocated at
    first use and at least double when full. `update` keeps the new tokens, `preview` only shows them: it may use the
    spare room behind `length` as scratch space, but what is cached never changes. Where gradients flow both
    concatenate instead of writing in place.

    The names `update`, `get_seq_length` and `crop` are those of transformers' caches, so either kind can be given to
    the model's forward; `preview` (commit=False) needs this one.
    """

    def __init__(self, num_layers: int, capacity: int = 0):
        """capacity: tokens to make room for at first use."""
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._lengths = [0] * num_layers
        self._capacity = capacity

    @property
    def length(self) -> int:
        """Tokens cached."""
        return self._lengths[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached in one layer; the same for all layers between forwards."""
        return self._lengths[layer_idx]

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append [B, heads, N, head_dim] to a layer; returns everything cached, new tokens included."""
        keys, values = self.preview(key, value, layer_idx)
        if _needs_gradient(key, value):
            self._keys[layer_idx], self._values[layer_idx] = keys, values
        self._lengths[layer_idx] += key.shape[2]
        return keys, values

    def preview(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """What `update` would return, without keeping the new tokens."""
        return self._extend(self._keys, key, value, layer_idx), self._extend(self._values, value, key, layer_idx)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises ValueError if there are fewer."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop a cache of {self.length} tokens to {length}")
        self._lengths = [length] * len(self._lengths)

    def _extend(self, buffers: list[Tensor | None], new: Tensor, partner: Tensor, layer: int) -> Tensor:
        """The cached tokens of one buffer followed by `new`."""
        start, buffer = self._lengths[layer], buffers[layer]
        if _needs_gradient(new, partner):
            return new if buffer is None else torch.cat((buffer[:, :, :start], new), dim=2)
        stop = start + new.shape[2]
        if buffer is None or buffer.shape[2] < stop:
            buffer = buffers[layer] = self._grow(buffer, start, stop, new)
        assert buffer.shape[0] == new.shape[0], "one cache serves one batch"
        buffer[:, :, start:stop] = new
        return buffer[:, :, :stop]

    def _grow(self, buffer: Tensor | None, start: int, stop: int, like: Tensor) -> Tensor:
        """A buffer with room for `stop` tokens that holds the first `start` of the old one."""
        doubled = 0 if buffer is None else 2 * buffer.shape[2]
        batch, heads, _, head_dim = like.shape
        grown = like.new_empty(batch, heads, max(stop, doubled, self._capacity), head_dim)
        if buffer is not None:
            grown[:, :, :start] = buffer[:, :, :start]
        return grown


def _needs_gradient(key: Tensor, value: Tensor) -> bool:
    """In-place writes would spoil tensors that autograd has saved."""
    return torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)

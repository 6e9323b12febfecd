"""Compute attention in groups of positions under masks: packed documents and context-parallel shards on the CPU.

The clean half is causal attention. The noisy half is computed in groups of neighbouring positions: a group's keys are
the clean ones before its last block and the noisy ones of its own blocks, about L^2 / 2 pairs instead of the 4 L^2 of a
dense mask over both halves. A context-parallel rank does the same with its positions, clean ones in groups too.
Shapes: B batch, H query heads, G key heads, S clean length, R positions, D head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention.visibility import VisibleKeys

# Positions per group: fewer waste less on blocks of a group that do not see each other, more make larger matmuls.
# 128 measured fastest at S 512 to 2048 with blocks of 32 (variants: 32, 64, 128, 256).
GROUP_SIZE = 128


@dataclass(frozen=True)
class Group:
    """Lets positions [start, stop) of a half attend to clean keys [0, prefix) and noisy keys [low, high).

    mask: [B, 1, positions, keys] bool; None: all are seen.
    """

    start: int
    stop: int
    prefix: int
    low: int
    high: int
    mask: Tensor | None

    def take_keys(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """Return the group's keys (or values) [B, G, keys, D] of noisy and clean ones."""
        clean = clean[:, :, : self.prefix]
        return clean if self.low == self.high else torch.cat([clean, noisy[:, :, self.low : self.high]], dim=2)


@dataclass(frozen=True)
class GroupedAttention:
    """Attends under one layout.

    num_noisy: noisy positions, before the clean ones. clean_groups: None where the whole clean half is one call under
    clean_mask [B, 1, S, S]; that is None where it is causal throughout.
    """

    num_noisy: int
    noisy_groups: tuple[Group, ...]
    clean_groups: tuple[Group, ...] | None
    clean_mask: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map query [B, H, R, D], key and value [B, G, K, D] to [B, H, R, D]; K = R, or all that a shard sees."""
        if not self.num_noisy:
            return self._attend_clean(query, key, value)
        halves = (tensor.tensor_split([self.num_noisy], dim=2) for tensor in (query, key, value))
        (noisy_query, query), (noisy_key, key), (noisy_value, value) = halves
        noisy = [_attend_group(g, noisy_query, noisy_key, noisy_value, key, value) for g in self.noisy_groups]
        return torch.cat([*noisy, self._attend_clean(query, key, value)], dim=2)

    def _attend_clean(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.clean_groups is not None:
            return torch.cat([_attend_group(g, query, key, value, key, value) for g in self.clean_groups], dim=2)
        causal = self.clean_mask is None
        return scaled_dot_product_attention(
            query, key, value, attn_mask=self.clean_mask, is_causal=causal, enable_gqa=True
        )


def _attend_group(
    group: Group, query: Tensor, noisy_key: Tensor, noisy_value: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    keys, values = group.take_keys(noisy_key, key), group.take_keys(noisy_value, value)
    queries = query[:, :, group.start : group.stop]
    return scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask, enable_gqa=True)


def build_grouped_attention(keys: VisibleKeys, chunk_length: int | None = None) -> GroupedAttention:
    """Cut positions into groups and build their masks; masks have B = 1 where all sequences are laid out alike.

    chunk_length: of the chunks that a context-parallel shard holds; None: it is the whole sequence.
    """
    num_positions = keys.clean_start.shape[1] - keys.num_noisy
    noisy_edges = _cut_into_groups(keys.num_noisy, chunk_length or num_positions)
    noisy_groups = tuple(_build_group(keys, 0, *edge) for edge in noisy_edges)
    if chunk_length is None:
        return GroupedAttention(keys.num_noisy, noisy_groups, None, _build_clean_mask(keys))
    clean_edges = _cut_into_groups(num_positions, chunk_length)
    clean_groups = tuple(_build_group(keys, keys.num_noisy, *edge) for edge in clean_edges)
    return GroupedAttention(keys.num_noisy, noisy_groups, clean_groups, None)


def _cut_into_groups(num_positions: int, chunk_length: int) -> Iterator[tuple[int, int]]:
    """Yield the first position of every group and the one after its last; no group spans two chunks."""
    for chunk in range(0, num_positions, chunk_length):
        stop = min(chunk + chunk_length, num_positions)
        for start in range(chunk, stop, GROUP_SIZE):
            yield start, min(start + GROUP_SIZE, stop)


def _build_clean_mask(keys: VisibleKeys) -> Tensor | None:
    start, stop = keys.clean_start[:, keys.num_noisy :], keys.clean_stop[:, keys.num_noisy :]
    is_causal = keys.gaps is None and not start.any() and bool((stop.diff(dim=1) == 1).all())
    return None if is_causal else keys.mask_clean(slice(keys.num_noisy, None), range(keys.num_clean))[:, None]


def _build_group(keys: VisibleKeys, first: int, start: int, stop: int) -> Group:
    """Build the group of positions [start, stop) of the half that begins with position `first`."""
    positions = slice(first + start, first + stop)
    prefix = int(keys.clean_stop[:, positions].max())
    low, high = int(keys.noisy_start[:, positions].min()), int(keys.noisy_stop[:, positions].max())
    mask = keys.mask_clean(positions, range(prefix))
    if low < high:
        mask = torch.cat([mask, keys.mask_noisy(positions, range(low, high))], dim=2)
    return Group(start, stop, prefix, low, high, None if mask.all() else mask[:, None])

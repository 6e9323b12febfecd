"""Who sees whom in one forward: masks for attention, and where the new tokens stand.

Shapes: B batch, N new tokens, T visible slots of the cache (cached, new and, with fixed shapes, spare ones), G query
heads per key/value head, whose rows attention folds into one head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Which of the T slots each of the N new tokens sees.

    num_causal: the first so many new tokens see tokens 0..i alone, the others all; only where nothing is cached
        (N == T) and `mask` is None.
    mask: [B or 1, 1, G*N, T], bool (true where seen) or a bias (0 where seen, else minus infinity), rows repeated for
        the G heads of a group; None: all are seen.
    """

    num_causal: int = 0
    mask: Tensor | None = None


ALL_SEEN = Visibility()


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The new tokens of a forward relative to each other. Every one of them sees the whole cached prefix.

    offsets: [B or 1, N], position behind the prefix; None: 0..N-1.
    visible: [B or 1, N, N] bool, which new tokens a new token sees; None: all.
    num_causal: where nothing is cached, as in Visibility and instead of `visible`.
    is_reused: whether further forwards have this layout.
    """

    num_tokens: int
    offsets: Tensor | None = None
    visible: Tensor | None = None
    num_causal: int = 0
    is_reused: bool = True


def make_causal_layout(num_tokens: int, device: torch.device) -> TokenLayout:
    """Token i sees new tokens 0..i."""
    if num_tokens == 1:
        return TokenLayout(1)
    visible = torch.ones(1, num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    return TokenLayout(num_tokens, visible=visible, num_causal=num_tokens)


def make_prefill_layout(num_prompt: int, num_masks: int) -> TokenLayout:
    """A prompt, causal, and masks behind it that see all of it and each other; nothing is cached before."""
    return TokenLayout(num_prompt + num_masks, num_causal=num_prompt)


def make_group_layout(num_drafted: int, groups: Tensor, num_masks: int, *, is_reused: bool) -> TokenLayout:
    """Tokens to verify followed by groups of masks, all in one forward (quadratic self-speculation).

    The first 1 + num_drafted tokens are a seed and its draft, causal among themselves. groups [B or 1, K]: each is the
    index of one of them; a group's num_masks masks stand behind that token as if the draft ended there: they see it,
    what precedes it, and each other both ways. No token of the draft sees a mask.
    """
    device, num_verified = groups.device, 1 + num_drafted
    verified = torch.arange(num_verified, device=device)
    owner = groups.repeat_interleave(num_masks, dim=1)  # of each mask, [B, K * num_masks]
    group = torch.arange(groups.shape[1], device=device).repeat_interleave(num_masks)
    num_tokens = num_verified + owner.shape[1]
    visible = torch.zeros(len(groups), num_tokens, num_tokens, dtype=torch.bool, device=device)
    visible[:, :num_verified, :num_verified] = verified[:, None] >= verified
    visible[:, num_verified:, :num_verified] = owner[:, :, None] >= verified
    visible[:, num_verified:, num_verified:] = group[:, None] == group
    behind = torch.arange(1, 1 + num_masks, device=device).repeat(groups.shape[1])
    offsets = torch.cat((verified.expand(len(groups), -1), owner + behind), dim=1)
    return TokenLayout(num_tokens, offsets, visible, is_reused=is_reused)


class MaskBuilder:
    """Turns layouts into masks for one decode.

    While all rows have cached equally much, the mask of a layout is a window of one bias built once: whatever the
    length of the prefix, everything is seen of it, so a longer prefix only moves the window's left edge.
    """

    def __init__(self, group_size: int, dtype: torch.dtype):
        """group_size: G. dtype: of the hidden states."""
        self._group_size = group_size
        self.dtype = dtype
        self._windows: dict[TokenLayout, Tensor] = {}

    def build(self, layout: TokenLayout, lengths: Tensor | None, num_visible: int, capacity: int) -> Visibility:
        """lengths, num_visible: what PrefixCache.begin gave for the layout's tokens; capacity: of that cache."""
        if lengths is not None:
            return Visibility(mask=self._gather(layout, lengths, num_visible))
        if layout.num_causal and num_visible == layout.num_tokens:
            return Visibility(layout.num_causal)
        if layout.visible is None:
            return ALL_SEEN
        if not layout.is_reused:
            return Visibility(mask=self._build_window(layout.visible, num_visible - layout.num_tokens))
        window = self._windows.get(layout)
        if window is None or window.shape[-1] < capacity + layout.num_tokens:
            window = self._windows[layout] = self._build_window(layout.visible, capacity)
        return Visibility(mask=window[..., window.shape[-1] - num_visible :])

    def _build_window(self, visible: Tensor, capacity: int) -> Tensor:
        """[B or 1, 1, G*N, capacity + N]: a prefix of `capacity` slots, all seen, and the new tokens."""
        prefix = visible.new_ones(*visible.shape[:2], capacity)
        return self._to_bias(torch.cat((prefix, visible), dim=2))

    def _gather(self, layout: TokenLayout, lengths: Tensor, num_visible: int) -> Tensor:
        """[B, 1, G*N, T] where rows have cached `lengths` [B, 1] tokens, so that new ones begin at different slots."""
        visible = layout.visible
        if visible is None:
            visible = torch.ones(1, layout.num_tokens, layout.num_tokens, dtype=torch.bool, device=lengths.device)
        # Columns: the prefix, each new token, and what lies behind all of them.
        edge = visible[..., :1]
        columns = torch.cat((torch.ones_like(edge), visible, torch.zeros_like(edge)), dim=2)
        rows = max(len(columns), len(lengths))  # either may be one for all rows
        column_of_slot = torch.arange(num_visible, device=lengths.device) - lengths + 1
        column_of_slot = column_of_slot.clamp(0, layout.num_tokens + 1)[:, None].expand(rows, layout.num_tokens, -1)
        return self._to_bias(columns.expand(rows, -1, -1).gather(2, column_of_slot))

    def _to_bias(self, visible: Tensor) -> Tensor:
        """[B, N, T] bool -> [B, 1, G*N, T]."""
        bias = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return bias.masked_fill_(~visible, -torch.inf).repeat(1, self._group_size, 1)[:, None]


def build_visibility(
    attention_mask: Tensor | None,
    *,
    num_new: int,
    num_total: int,
    bidirectional: bool,
    group_size: int,
    device: torch.device,
) -> Visibility:
    """For callers of the model's forward: combine the mode with an optional mask.

    attention_mask: None; [B, T] with zeros on padding; or [B or 1, 1, N, T] bool, which then decides alone.
    bidirectional: new tokens see each other both ways (and the whole cache) instead of causally.
    group_size: G, query heads per key/value head.

    Raises:
        ValueError: attention_mask has another shape or, with four dimensions, is not bool.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        if attention_mask.dtype != torch.bool or attention_mask.shape[1:] != (1, num_new, num_total):
            raise ValueError(
                f"a 4D attention_mask must be bool [batch, 1, {num_new}, {num_total}] with true where a token is "
                f"seen, got {attention_mask.dtype} {list(attention_mask.shape)}"
            )
        return Visibility(mask=attention_mask.repeat(1, 1, group_size, 1))
    padding = _read_padding(attention_mask, num_total)
    causal = num_new > 1 and not bidirectional
    if padding is None and (not causal or num_new == num_total):
        return Visibility(num_new if causal else 0)
    queries = torch.arange(num_total - num_new, num_total, device=device)[:, None]
    keys = torch.arange(num_total, device=device)[None]
    mask = (keys <= queries) if causal else torch.ones_like(keys <= queries)
    if padding is None:
        return Visibility(mask=mask.repeat(group_size, 1)[None, None])
    # A padding token sees at least itself: a row without any key would be NaN.
    mask = (mask & padding[:, None, None, :]) | (keys == queries)
    return Visibility(mask=mask.repeat(1, 1, group_size, 1))


def _read_padding(attention_mask: Tensor | None, num_total: int) -> Tensor | None:
    """[B, T] bool, or None where nothing is padded."""
    if attention_mask is None or bool((attention_mask != 0).all()):
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != num_total:
        raise ValueError(
            f"attention_mask must be [batch, {num_total}] (cached and new tokens), got {list(attention_mask.shape)}"
        )
    return attention_mask != 0

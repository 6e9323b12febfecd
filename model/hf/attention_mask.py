"""Who sees whom in one forward: the attention mask, and the positions of the new tokens.

Shapes: B sequences, N new tokens, T visible slots of the cache (cached, new and, with fixed shapes, spare ones), G
query heads per key/value head, whose queries attention folds into one head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Says which of the T slots each of the N new tokens sees.

    Attributes:
        num_causal: so many new tokens, the first ones, see tokens 0..i alone, the others all; used only where nothing
            is cached (N == T) and `mask` is None.
        mask: [B or 1, 1, G*N, T], bool (true where seen) or a bias (0 where seen, else minus infinity), repeated for
            the G heads of a group; None: all are seen.
    """

    num_causal: int = 0
    mask: Tensor | None = None


ALL_SEEN = Visibility()


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Relates the new tokens of a forward to each other. Each of them sees the whole cached prefix.

    Attributes:
        num_tokens: N.
        offsets: [B or 1, N], positions counted from the end of the prefix; None: 0..N-1.
        visible: [B or 1, N, N] bool, which new tokens a new token sees; None: all.
        num_causal: as in Visibility; replaces `visible` where nothing is cached.
        is_reused: whether further forwards have this layout, so that its mask is worth storing.
    """

    num_tokens: int
    offsets: Tensor | None = None
    visible: Tensor | None = None
    num_causal: int = 0
    is_reused: bool = True


def make_causal_layout(num_tokens: int, device: torch.device) -> TokenLayout:
    """Build the layout in which token i sees new tokens 0..i."""
    if num_tokens == 1:
        return TokenLayout(1)
    visible = torch.ones(1, num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    return TokenLayout(num_tokens, visible=visible, num_causal=num_tokens)


def make_prefill_layout(num_prompt: int, num_masks: int) -> TokenLayout:
    """Build the layout of a causal prompt followed by masks that see it and each other; nothing is cached yet."""
    return TokenLayout(num_prompt + num_masks, num_causal=num_prompt)


def make_canvas_layout(lengths: Sequence[int], num_canvas: int, device: torch.device) -> TokenLayout:
    """Build the layout of causal prompts, each followed by a canvas that sees it and itself; nothing is cached yet.

    lengths: of the prompts. Shorter sequences end in padding, which nothing else sees.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return make_prefill_layout(longest, num_canvas)
    slots = torch.arange(longest + num_canvas, device=device)
    start = torch.tensor(lengths, device=device)[:, None]
    in_canvas = (slots >= start) & (slots < start + num_canvas)
    visible = (slots[:, None] >= slots) | (in_canvas[:, :, None] & in_canvas[:, None])
    return TokenLayout(len(slots), visible=visible, is_reused=False)


def make_group_layout(num_drafted: int, groups: Tensor, num_masks: int, *, is_reused: bool) -> TokenLayout:
    """Build the layout of tokens to verify followed by groups of masks (quadratic self-speculation).

    The first 1 + num_drafted tokens are a seed and its draft, causal among themselves. A group's num_masks masks follow
    one of these tokens as if the draft ended there: they see it, the tokens before it, and each other both ways. No
    token of the draft sees a mask.

    groups: [B or 1, K], the index of the token that each group follows.
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
    distance = torch.arange(1, 1 + num_masks, device=device).repeat(groups.shape[1])
    offsets = torch.cat((verified.expand(len(groups), -1), owner + distance), dim=1)
    return TokenLayout(num_tokens, offsets, visible, is_reused=is_reused)


class MaskBuilder:
    """Turns layouts into masks for one decode.

    While all sequences have cached equally much, the mask of a layout is a window of one bias built once: all of the
    prefix is seen whatever its length, so a longer prefix only moves the window's left edge.
    """

    def __init__(self, group_size: int, dtype: torch.dtype):
        """Set G (group_size) and the dtype of the hidden states."""
        self._group_size = group_size
        self.dtype = dtype
        self._windows: dict[TokenLayout, Tensor] = {}

    def build(self, layout: TokenLayout, lengths: Tensor | None, num_visible: int, capacity: int) -> Visibility:
        """Build the mask of a layout from what PrefixCache.begin gave for its tokens.

        Args:
            layout: of the new tokens.
            lengths: what `begin` returned.
            num_visible: T, set by `begin`.
            capacity: of that cache, in slots.
        """
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
        """Return [B or 1, 1, G*N, capacity + N]: a prefix of `capacity` slots, all seen, and the new tokens."""
        prefix = visible.new_ones(*visible.shape[:2], capacity)
        return self._to_bias(torch.cat((prefix, visible), dim=2))

    def _gather(self, layout: TokenLayout, lengths: Tensor, num_visible: int) -> Tensor:
        """Return [B, 1, G*N, T] for sequences of `lengths` [B, 1], whose new tokens begin at different slots."""
        visible = layout.visible
        if visible is None:
            visible = torch.ones(1, layout.num_tokens, layout.num_tokens, dtype=torch.bool, device=lengths.device)
        # Columns: the prefix, each new token, and the slots after all of them.
        edge = visible[..., :1]
        columns = torch.cat((torch.ones_like(edge), visible, torch.zeros_like(edge)), dim=2)
        batch = max(len(columns), len(lengths))  # either may be one for all sequences
        column_of_slot = torch.arange(num_visible, device=lengths.device) - lengths + 1
        column_of_slot = column_of_slot.clamp(0, layout.num_tokens + 1)[:, None].expand(batch, layout.num_tokens, -1)
        return self._to_bias(columns.expand(batch, -1, -1).gather(2, column_of_slot))

    def _to_bias(self, visible: Tensor) -> Tensor:
        """Turn [B, N, T] bool into a bias [B, 1, G*N, T]."""
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
    """Combine causal or bidirectional attention with the mask given to the model's forward.

    Args:
        attention_mask: None; [B, T] with zeros on padding; or [B or 1, 1, N, T] bool, which then decides alone.
        num_new: N.
        num_total: T, cached and new tokens.
        bidirectional: new tokens see each other both ways (and the whole cache) instead of causally.
        group_size: G, query heads per key/value head.
        device: where the mask is needed.

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
    # A padding token sees at least itself: a query without any key would give NaN.
    mask = (mask & padding[:, None, None, :]) | (keys == queries)
    return Visibility(mask=mask.repeat(1, 1, group_size, 1))


def _read_padding(attention_mask: Tensor | None, num_total: int) -> Tensor | None:
    """Return [B, T] bool, false on padding, or None where nothing is padded."""
    if attention_mask is None or bool((attention_mask != 0).all()):
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != num_total:
        raise ValueError(
            f"attention_mask must be [batch, {num_total}] (cached and new tokens), got {list(attention_mask.shape)}"
        )
    return attention_mask != 0

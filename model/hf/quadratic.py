"""Quadratic self-speculation: the next draft is made in the same forward that verifies this one.

A forward has the seed and M drafted tokens, causal, and behind each of them a group of block_length masks that sees
what precedes it: wherever acceptance ends, the masks of the group there have predicted what follows. The first mask
stands where the verifier's own token will be, the others become the next draft.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention_mask import TokenLayout, make_group_layout, make_prefill_layout
from .options import DecodeOptions, check_options, resolve_block_length
from .sampling import Draft, Verdict
from .session import DecodeResult, DecodeSession
from .speculation import (
    count_proposed,
    emit_all,
    judge,
    make_empty_draft,
    verify_draft,
)

MAX_ROWS = 1 << 13  # of a forward: the mask between them grows with their square


@torch.no_grad()
def decode_quadratic_speculation(
    model: Any, prompt_ids: Tensor, options: DecodeOptions, attention_mask: Tensor | None = None
) -> DecodeResult:
    """Verify a draft of block_length - 1 tokens and make the next one in one forward; emit 1..block_length per forward.

    Greedy output equals greedy AR token for token; with a temperature it has AR's distribution. A draft adapter, if
    attached, applies to the rows of masks alone, in the same forward as rows that verify without it.
    mask_groups: compute only so many groups: the first, and where the draft's confidence says that acceptance most
    probably ends. If it ends elsewhere, the last group before makes a shorter draft. None: one for every possible end.
    threshold: as in linear speculation. prompt_ids [B, P]; attention_mask [B, P], zero on left padding. The streamer
    gets the prefill's token, then what each cycle accepted.

    Raises:
        ValueError: prompts or options that cannot be decoded, or several prompts for one streamer.
    """
    check_options(model.config, options)
    # What is never emitted is not drafted either: a block as long as the answer is the longest that makes sense.
    block_length = min(resolve_block_length(model.config, options), max(options.max_new_tokens, 2))
    num_groups = block_length if options.mask_groups is None else min(options.mask_groups, block_length)
    num_rows = block_length * (1 + num_groups)
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"block_length {block_length} with {num_groups} groups of masks makes forwards of {num_rows} rows, more "
            f"than {MAX_ROWS}: lower block_length or mask_groups"
        )
    options = replace(options, block_length=block_length)
    session = DecodeSession(model, prompt_ids, attention_mask, options, largest_forward=num_rows)
    cycles = _QuadraticCycles(session, num_groups)
    return emit_all(session, cycles.prefill, cycles.run)


class _QuadraticCycles:
    """Cycles of one decode, with the draft that each leaves to the next."""

    def __init__(self, session: DecodeSession, max_groups: int):
        self._session = session
        self._max_groups = max_groups
        self._needs_confidence = max_groups < session.block_length or bool(session.options.threshold)
        self._whole_layout: TokenLayout | None = None
        self._draft: Draft | None = None

    def prefill(self) -> Tensor:
        """Write the prompts to the cache and make the first draft; returns the first tokens [B, 1].

        Prompts of different lengths are not drafted behind: their ends lie apart, and the mask that says so would grow
        with the square of their length. The first cycle then has nothing to verify.
        """
        session, prompt = self._session, self._session.prompt.tokens
        if session.prompt.is_ragged or session.options.max_new_tokens == 1:
            return session.prefill()
        num_prompt = prompt.shape[1]
        masks = prompt.new_full((len(prompt), session.block_length), session.mask_token_id)
        layout = make_prefill_layout(num_prompt, session.block_length)
        tokens = torch.cat((prompt, masks), dim=1)
        hidden = session.encode("prefill", tokens, layout, draft_rows=slice(num_prompt, None))
        session.cache.advance(num_prompt)
        seed = session.choose_next(hidden[:, num_prompt - 1 : num_prompt])
        self._draft = self._make_draft(hidden[:, num_prompt:], None, num_accepted=seed.new_zeros(len(seed)))
        return seed

    def run(self, seed: Tensor, length: int) -> tuple[Verdict, Tensor]:
        """Verify the draft behind seed [B, 1], at most length - 1 tokens of it, and make the next one."""
        session = self._session
        draft = make_empty_draft(session, seed) if self._draft is None else self._draft.cut(length - 1)
        num_proposed = count_proposed(session, draft)
        if length == 1:
            return verify_draft(session, seed, draft), num_proposed
        groups = self._choose_groups(draft)
        layout = self._layout(draft, groups)
        num_verified = 1 + draft.tokens.shape[1]
        masks = seed.new_full((len(seed), layout.num_tokens - num_verified), session.mask_token_id)
        tokens = torch.cat((seed, draft.tokens, masks), dim=1)
        hidden = session.encode("draft_and_verify", tokens, layout, draft_rows=slice(num_verified, None))
        verdict = judge(session, hidden[:, :num_verified], draft)
        self._draft = self._make_draft(hidden[:, num_verified:], groups, verdict.num_accepted)
        return verdict, num_proposed

    def _choose_groups(self, draft: Draft) -> Tensor | None:
        """Indices [B, K] in ascending order: behind which of seed and drafted tokens a group of masks stands.

        None: behind each of them.
        """
        if self._max_groups > draft.tokens.shape[1]:
            return None
        assert draft.confidence is not None
        reached = pad(draft.confidence.cumprod(1), (1, 0), value=1.0)  # probability that acceptance gets that far
        ends_there = reached - pad(reached[:, 1:], (0, 1))
        ends_there[:, 0] = 2.0  # surely: with the first group there is one before every end, and so a draft
        return ends_there.topk(self._max_groups, dim=1).indices.sort(1).values

    def _layout(self, draft: Draft, groups: Tensor | None) -> TokenLayout:
        """A layout for this draft; the one of a whole draft with all groups, by far the most frequent, is kept."""
        num_drafted, num_masks = draft.tokens.shape[1], self._session.block_length
        if groups is not None:
            return make_group_layout(num_drafted, groups, num_masks, is_reused=False)
        is_whole = num_drafted == num_masks - 1
        if is_whole and self._whole_layout is not None:
            return self._whole_layout
        every_end = torch.arange(1 + num_drafted, device=draft.tokens.device)[None]
        layout = make_group_layout(num_drafted, every_end, num_masks, is_reused=is_whole)
        if is_whole:
            self._whole_layout = layout
        return layout

    def _make_draft(self, hidden: Tensor, groups: Tensor | None, num_accepted: Tensor) -> Draft:
        """The next draft, from the group in front of which acceptance ended; hidden [B, K * block_length, hidden].

        The head sees the rows of that one group only.
        """
        session = self._session
        by_group = hidden.unflatten(1, (-1, session.block_length))
        if groups is None:
            # The bonus token stands where the group's first mask does, the draft behind it.
            rows, is_proposed = by_group[torch.arange(len(hidden), device=hidden.device), num_accepted, 1:], None
        else:
            rows, is_proposed = _take_last_group(by_group, groups, num_accepted)
        draft = session.sampler.draft(session.project(rows), with_confidence=self._needs_confidence)
        if draft.confidence is not None and session.options.threshold:
            is_sure = (draft.confidence >= session.options.threshold).long().cumprod(1).bool()
            is_proposed = is_sure if is_proposed is None else is_sure & is_proposed
        if is_proposed is None:
            return draft
        draft = _withdraw(draft, ~is_proposed, session.mask_token_id)
        if session.fixed_shapes:
            return draft
        return draft.cut(int(is_proposed.sum(1).max()))  # no row proposes more: fewer rows and groups to compute


def _take_last_group(by_group: Tensor, groups: Tensor, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, M - 1, hidden] for the next draft from the last group before the end, and which of them propose.

    by_group [B, K, M, hidden]; groups [B, K]; num_accepted [B]. The first masks of a group before the end stand for
    tokens known by now, so that the draft is shorter.
    """
    num_masks = by_group.shape[2]
    chosen = (groups <= num_accepted[:, None]).sum(1, keepdim=True) - 1  # [B, 1]; the first is before every end
    # The bonus token stands where mask num_accepted - groups[chosen] of the group does, the draft behind it.
    first = num_accepted[:, None] - groups.gather(1, chosen) + 1
    index = first + torch.arange(num_masks - 1, device=groups.device)
    row = torch.arange(len(groups), device=groups.device)[:, None]
    return by_group[row, chosen, index.clamp(max=num_masks - 1)], index < num_masks


def _withdraw(draft: Draft, where: Tensor, mask_token_id: int) -> Draft:
    """The draft without the tokens at `where` [B, M]."""
    return Draft(
        draft.tokens.masked_fill(where, mask_token_id),
        None if draft.probabilities is None else draft.probabilities.masked_fill(where[..., None], 0.0),
        None if draft.confidence is None else draft.confidence.masked_fill(where, 0.0),
    )

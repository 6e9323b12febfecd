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

from .options_nemotron_labs_diffusion import DecodeOptions, check_options, resolve_block_length
from .sampling_nemotron_labs_diffusion import Draft, Verdict
from .session_nemotron_labs_diffusion import DecodeResult, DecodeSession
from .speculation_nemotron_labs_diffusion import (
    count_proposed,
    emit_all,
    judge,
    make_empty_draft,
    verify_draft,
)
from .visibility_nemotron_labs_diffusion import TokenLayout, make_group_layout, make_prefill_layout

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
        only_group, nothing_accepted = seed.new_zeros(1, 1), seed.new_zeros(len(seed))
        self._draft = self._make_draft(hidden[:, num_prompt:], only_group, nothing_accepted)
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

    def _choose_groups(self, draft: Draft) -> Tensor:
        """Indices [B or 1, K] in ascending order: behind which of seed and drafted tokens a group of masks stands."""
        num_ends = 1 + draft.tokens.shape[1]
        if self._max_groups >= num_ends:
            return torch.arange(num_ends, device=draft.tokens.device)[None]
        assert draft.confidence is not None
        reached = pad(draft.confidence.cumprod(1), (1, 0), value=1.0)  # probability that acceptance gets that far
        ends_there = reached - pad(reached[:, 1:], (0, 1))
        ends_there[:, 0] = 2.0  # surely: with the first group there is one before every end, and so a draft
        return ends_there.topk(self._max_groups, dim=1).indices.sort(1).values

    def _layout(self, draft: Draft, groups: Tensor) -> TokenLayout:
        """A layout for this draft; the one of a whole draft with all groups, by far the most frequent, is kept."""
        num_drafted, num_masks = draft.tokens.shape[1], self._session.block_length
        if groups.shape[1] < num_masks:
            return make_group_layout(num_drafted, groups, num_masks, is_reused=False)
        if self._whole_layout is None:
            self._whole_layout = make_group_layout(num_drafted, groups, num_masks, is_reused=True)
        return self._whole_layout

    def _make_draft(self, hidden: Tensor, groups: Tensor, num_accepted: Tensor) -> Draft:
        """The next draft, from the group in front of which acceptance ended; hidden [B, K * block_length, hidden].

        If there is none, the last group before it serves: its first masks stand for tokens known by now, so that the
        draft is shorter. The head sees the rows of that one group only.
        """
        session, num_masks = self._session, self._session.block_length
        is_before = groups <= num_accepted[:, None]
        chosen = is_before.sum(1, keepdim=True) - 1  # [B, 1]; the first group is before every end
        owner = groups.expand(len(hidden), -1).gather(1, chosen)
        # The bonus token stands where mask num_accepted - owner of the group does, the draft behind it.
        first = num_accepted[:, None] - owner + 1
        index = first + torch.arange(num_masks - 1, device=hidden.device)
        is_proposed = index < num_masks
        rows = chosen * num_masks + index.clamp(max=num_masks - 1)
        logits = session.project(hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[2])))
        draft = session.sampler.draft(logits, with_confidence=self._needs_confidence)
        if draft.confidence is not None and session.options.threshold:
            is_proposed &= (draft.confidence >= session.options.threshold).long().cumprod(1).bool()
        draft = _withdraw(draft, ~is_proposed, session.mask_token_id)
        if self._needs_confidence and not session.fixed_shapes:
            draft = draft.cut(int(is_proposed.sum(1).max()))  # no row proposes more: fewer rows and groups to compute
        return draft


def _withdraw(draft: Draft, where: Tensor, mask_token_id: int) -> Draft:
    """The draft without the tokens at `where` [B, M]."""
    return Draft(
        draft.tokens.masked_fill(where, mask_token_id),
        None if draft.probabilities is None else draft.probabilities.masked_fill(where[..., None], 0.0),
        None if draft.confidence is None else draft.confidence.masked_fill(where, 0.0),
    )

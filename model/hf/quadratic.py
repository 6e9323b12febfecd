"""Quadratic self-speculation: one forward verifies a draft and makes the next one.

A forward has the seed and M drafted tokens, causal, and after each of them a group of block_length masks that sees the
tokens up to there: wherever acceptance ends, the masks of the group there have predicted what follows. The first mask
stands where the verifier's own token will be, the others become the next draft.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .attention_mask import TokenLayout, make_group_layout, make_prefill_layout
from .options import QUADRATIC, DecodeOptions, DecodeResult, check_options, resolve_block_length
from .sampling import Draft, DraftVerification, mix_verifiers
from .session import DecodeSession, open_session
from .speculation import count_proposed, make_empty_draft, run_cycles, verify_draft

MAX_POSITIONS = 1 << 13  # of a forward: its mask grows with their square


@torch.no_grad()
def decode_quadratic_speculation(
    model: Any,
    prompt_ids: Tensor,
    options: DecodeOptions,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> DecodeResult:
    """Verify a draft of block_length - 1 tokens and make the next one in one forward; emit 1..block_length per forward.

    Greedy output equals greedy AR token for token; with a temperature it has AR's distribution. A draft adapter, if
    attached, applies to the masks alone, in the same forward as the positions that verify without it.
    verifier_weight: below 1 a draft is verified by lambda p_AR + (1 - lambda) p_diffusion (report, appendix C), where
    p_diffusion is predicted at the first mask after a token. Output then is that of the mixture, whose first token, the
    prefill's, is AR's.
    mask_groups: compute only so many groups: the first, and where the draft's confidence says that acceptance most
    probably ends. If it ends elsewhere, the last group before that makes a shorter draft. None: one for every end.
    threshold: as in linear speculation. prompt_ids [B, P]; attention_mask [B, P], zero on left padding. The streamer
    gets the prefill's token, then what each cycle accepted.

    Raises:
        ValueError: prompts or options that cannot be decoded, or several prompts for one streamer.
    """
    check_options(model.config, options)
    # A draft beyond the last token wanted is useless, so a block is at most as long as the response.
    block_length = min(resolve_block_length(model.config, options), max(options.max_new_tokens, 2))
    num_groups = block_length if options.mask_groups is None else min(options.mask_groups, block_length)
    num_positions = block_length * (1 + num_groups)
    if num_positions > MAX_POSITIONS:
        raise ValueError(
            f"block_length {block_length} with {num_groups} groups of masks makes forwards of {num_positions} "
            f"positions, more than {MAX_POSITIONS}: lower block_length or mask_groups"
        )
    options = replace(options, block_length=block_length)
    session = open_session(
        model, QUADRATIC, prompt_ids, attention_mask, options, inputs_embeds, largest_forward=num_positions
    )
    cycles = _QuadraticCycles(session, num_groups)
    return run_cycles(session, cycles.prefill, cycles.run)


class _QuadraticCycles:
    """The cycles of one decode, with the draft that each leaves to the next."""

    def __init__(self, session: DecodeSession, max_groups: int):
        self._session = session
        self._max_groups = max_groups
        self._verifier_weight = session.options.verifier_weight
        self._needs_confidence = max_groups < session.block_length or bool(session.options.threshold)
        self._whole_layout: TokenLayout | None = None
        self._draft: Draft | None = None

    def prefill(self) -> Tensor:
        """Write the prompts to the cache and make the first draft; return the first tokens [B, 1].

        Prompts of different lengths get no draft here: their ends lie apart, and the mask that says so would grow with
        the square of their length. The first cycle then has nothing to verify.
        """
        session, model, prompt = self._session, self._session.model, self._session.prompt.tokens
        if session.prompt.is_ragged or session.options.max_new_tokens == 1:
            return session.prefill()
        num_prompt = prompt.shape[1]
        masks = prompt.new_full((len(prompt), session.block_length), model.mask_token_id)
        layout = make_prefill_layout(num_prompt, session.block_length)
        tokens = torch.cat((prompt, masks), dim=1)
        hidden = model.encode("prefill", tokens, layout, drafting=slice(num_prompt, None))
        model.cache.advance(num_prompt)
        seed = session.choose_next(hidden[:, num_prompt - 1 : num_prompt])
        self._draft = self._make_draft(hidden[:, num_prompt:], None, num_accepted=seed.new_zeros(len(seed)))
        return seed

    def run(self, seed: Tensor, length: int) -> tuple[DraftVerification, Tensor]:
        """Verify the draft after seed [B, 1], at most length - 1 tokens of it, and make the next one."""
        session, model = self._session, self._session.model
        draft = make_empty_draft(session, seed) if self._draft is None else self._draft.cut(length - 1)
        num_proposed = count_proposed(session, draft)
        if length == 1 and self._verifier_weight == 1:
            return verify_draft(session, seed, draft), num_proposed
        groups = self._choose_groups(draft)
        layout = self._layout(draft, groups)
        num_verified = 1 + draft.tokens.shape[1]
        masks = seed.new_full((len(seed), layout.num_tokens - num_verified), model.mask_token_id)
        tokens = torch.cat((seed, draft.tokens, masks), dim=1)
        hidden = model.encode("draft_and_verify", tokens, layout, drafting=slice(num_verified, None))
        causal, masked = hidden[:, :num_verified], hidden[:, num_verified:]
        verification = session.verify(self._compute_verifier(causal, masked), draft)
        self._draft = self._make_draft(masked, groups, verification.num_accepted)
        return verification, num_proposed

    def _compute_verifier(self, causal: Tensor, masked: Tensor) -> Tensor:
        """Compute the logits [B, 1 + M, vocab] that verify M drafted tokens.

        causal [B, 1 + M, hidden] of seed and draft; masked [B, K * block_length, hidden] of the K groups of masks, one
        for each of them if the diffusion mode has a say.
        """
        project, weight = self._session.model.project, self._verifier_weight
        if weight == 1:
            return project(causal)
        first_masks = masked.unflatten(1, (-1, self._session.block_length))[:, :, 0]
        return mix_verifiers(project(causal), project(first_masks), weight)

    def _choose_groups(self, draft: Draft) -> Tensor | None:
        """Choose the tokens, of seed and draft, that a group of masks follows: indices [B, K] in ascending order.

        None: a group follows each of them.
        """
        if self._max_groups > draft.tokens.shape[1]:
            return None
        assert draft.confidence is not None
        reached = pad(draft.confidence.cumprod(1), (1, 0), value=1.0)  # probability that acceptance gets that far
        ends_there = reached - pad(reached[:, 1:], (0, 1))
        ends_there[:, 0] = 2.0  # always chosen: with the first group there is one before every end, and so a draft
        return ends_there.topk(self._max_groups, dim=1).indices.sort(1).values

    def _layout(self, draft: Draft, groups: Tensor | None) -> TokenLayout:
        """Return the layout for a draft; that of a whole draft with all groups, by far the most frequent, is stored."""
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
        """Make the next draft from the group where acceptance ended, or the last one before; no other meets the head.

        hidden [B, K * block_length, hidden].
        """
        session = self._session
        by_group = hidden.unflatten(1, (-1, session.block_length))
        if groups is None:
            # The bonus token stands where the group's first mask does, the draft follows it.
            batch = torch.arange(len(hidden), device=hidden.device)
            chosen, is_proposed = by_group[batch, num_accepted, 1:], None
        else:
            chosen, is_proposed = _take_last_group(by_group, groups, num_accepted)
        draft = session.sampler.draft(session.model.project(chosen), with_confidence=self._needs_confidence)
        if draft.confidence is not None and session.options.threshold:
            is_sure = (draft.confidence >= session.options.threshold).long().cumprod(1).bool()
            is_proposed = is_sure if is_proposed is None else is_sure & is_proposed
        if is_proposed is None:
            return draft
        draft = draft.withdraw(~is_proposed, session.model.mask_token_id)
        if session.model.fixed_shapes:
            return draft
        return draft.cut(int(is_proposed.sum(1).max()))  # no sequence proposes more: fewer positions to compute


def _take_last_group(by_group: Tensor, groups: Tensor, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
    """Take the next draft's hidden states [B, M - 1, hidden] from the last group up to where acceptance ended.

    by_group [B, K, M, hidden]; groups [B, K]; num_accepted [B]. The first masks of a group before the end stand for
    tokens known by now, so that the draft is shorter.

    Returns:
        The hidden states, and bool [B, M - 1] where they propose a token.
    """
    num_masks = by_group.shape[2]
    chosen = (groups <= num_accepted[:, None]).sum(1, keepdim=True) - 1  # [B, 1]; the first is before every end
    # The bonus token stands where mask num_accepted - groups[chosen] of the group does, the draft follows it.
    first = num_accepted[:, None] - groups.gather(1, chosen) + 1
    index = first + torch.arange(num_masks - 1, device=groups.device)
    batch = torch.arange(len(groups), device=groups.device)[:, None]
    return by_group[batch, chosen, index.clamp(max=num_masks - 1)], index < num_masks

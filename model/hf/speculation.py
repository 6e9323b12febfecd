"""Self-speculation: the diffusion mode drafts tokens, the AR mode verifies them.

Both modes of it share one loop: a cycle drafts and verifies, and emits what was accepted and the verifier's own token.
Linear spends two forwards on a cycle, quadratic one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layers import ALL_ROWS
from .options import DecodeOptions
from .sampling import Draft, Verdict
from .session import DecodeResult, DecodeSession, cut_at_stop

# seed [B, 1], tokens wanted at most -> what the verifier says of a draft behind the seed, and how much was proposed [B]
Cycle = Callable[[Tensor, int], tuple[Verdict, Tensor]]


@torch.no_grad()
def decode_linear_speculation(
    model: Any, prompt_ids: Tensor, options: DecodeOptions, attention_mask: Tensor | None = None
) -> DecodeResult:
    """Draft up to block_length - 1 tokens in one forward, verify them causally in another, emit 1..block_length.

    Greedy output equals greedy AR token for token; with a temperature it has AR's distribution. A draft adapter, if
    attached, is on for drafts only. The last blocks are as long as what is left, and one of length 1 is not drafted.
    threshold: a draft ends before the first position whose best token has a lower probability (temperature 1); 0
    sends all of it to verification. It saves verified rows and never changes what is emitted under greedy decoding,
    nor its distribution otherwise: the cut does not look at the token drawn.
    prompt_ids [B, P]; attention_mask [B, P], zero on left padding. The streamer gets the prefill's token, then what
    each cycle accepted.

    Raises:
        ValueError: prompts or options that cannot be decoded, or several prompts for one streamer.
    """
    session = DecodeSession(model, prompt_ids, attention_mask, options)
    return emit_all(session, session.prefill, lambda seed, length: run_linear_cycle(session, seed, length))


def run_linear_cycle(session: DecodeSession, seed: Tensor, length: int) -> tuple[Verdict, Tensor]:
    """Draft and verify a block of `length` tokens that begins with seed [B, 1]; keeps nothing of it in the cache."""
    draft = draft_block(session, seed, length)
    return verify_draft(session, seed, draft), count_proposed(session, draft)


def draft_block(session: DecodeSession, seed: Tensor, length: int) -> Draft:
    """Propose length - 1 tokens after seed [B, 1] in one bidirectional forward.

    A batch drafts as much as its longest draft above the threshold, as nothing is gained by less.
    """
    if length == 1:
        return make_empty_draft(session, seed)
    block = seed.new_full((len(seed), length), session.mask_token_id)
    block[:, :1] = seed
    hidden = session.encode("draft", block, session.layout(length, bidirectional=True), draft_rows=ALL_ROWS)
    threshold = session.options.threshold or 0.0
    draft = session.sampler.draft(session.project(hidden[:, 1:]), with_confidence=threshold > 0)
    if draft.confidence is None:
        return draft
    return draft.cut(int((draft.confidence >= threshold).long().cumprod(1).sum(1).max()))


def make_empty_draft(session: DecodeSession, seed: Tensor) -> Draft:
    """Nothing proposed behind seed [B, 1]."""
    nothing = seed[:, :0]
    if session.sampler.is_greedy:
        return Draft(nothing, None, nothing.float())
    vocab_size = session.model.config.vocab_size
    return Draft(nothing, torch.zeros(len(seed), 0, vocab_size, device=seed.device), nothing.float())


def verify_draft(session: DecodeSession, seed: Tensor, draft: Draft) -> Verdict:
    """One causal forward over seed [B, 1] and draft."""
    tokens = torch.cat((seed, draft.tokens), dim=1)
    hidden = session.encode("verify", tokens, session.layout(tokens.shape[1]))
    return judge(session, hidden, draft)


def judge(session: DecodeSession, hidden: Tensor, draft: Draft) -> Verdict:
    """What the verifier says, from its hidden rows [B, 1 + M, hidden] of a seed and M drafted tokens."""
    logits = session.thinking.force(session.project(hidden), draft.tokens)
    verdict = session.sampler.verify(draft, logits)
    session.thinking.keep(verdict.tokens, verdict.num_accepted + 1)
    return verdict


def count_proposed(session: DecodeSession, draft: Draft) -> Tensor:
    """Tokens of a draft [B] that are proposals."""
    return (draft.tokens != session.mask_token_id).sum(1)


def emit_all(session: DecodeSession, prefill: Callable[[], Tensor], run_cycle: Cycle) -> DecodeResult:
    """Prefill (gives the first tokens [B, 1]), then cycles until every row has max_new_tokens or a stop token.

    Rows accept different numbers of tokens; each has its own place in the cache. One that has finished stays where it
    is while the others go on.
    """
    max_new_tokens, stop_ids = session.options.max_new_tokens, session.stop_ids
    seed = prefill()
    new_tokens: list[list[int]] = seed.tolist()
    session.stream.put(new_tokens[0], stop_ids)
    acceptance_lengths: list[int] = []
    while left := _count_left(new_tokens, max_new_tokens, stop_ids):
        length = session.block_length if session.fixed_shapes else min(session.block_length, max(left))
        verdict, num_proposed = run_cycle(seed, length)
        # The only transfer to the host in a cycle (apart from a threshold's): the tokens and how many count.
        columns = (verdict.tokens, verdict.num_accepted[:, None], num_proposed[:, None])
        kept = [0] * len(new_tokens)
        for row, (*tokens, accepted, proposed) in enumerate(torch.cat(columns, dim=1).tolist()):
            if left[row] == 0:
                continue
            emitted = cut_at_stop(tokens[: min(accepted + 1, left[row])], stop_ids)
            new_tokens[row] += emitted
            kept[row] = accepted + 1
            acceptance_lengths.append(len(emitted))
            session.num_proposed += proposed
            session.num_committed += min(accepted, len(emitted))
            session.stream.put(emitted, stop_ids)
        session.cache.advance(kept)
        seed = verdict.bonus()
    return session.finish(_stack(new_tokens, session), acceptance_lengths)


def _count_left(new_tokens: list[list[int]], max_new_tokens: int, stop_ids: tuple[int, ...]) -> list[int]:
    """Tokens each row still has to emit; empty when no row has."""
    left = [0 if row[-1] in stop_ids else max_new_tokens - len(row) for row in new_tokens]
    return left if any(left) else []


def _stack(new_tokens: list[list[int]], session: DecodeSession) -> Tensor:
    """[B, T], rows that stopped early filled up with their last token, a stop id."""
    length = max(len(row) for row in new_tokens)
    return torch.tensor([row + row[-1:] * (length - len(row)) for row in new_tokens], device=session.device)


@torch.no_grad()
def real_context_acceptance(
    model: Any, prefixes: Tensor, block_length: int, mask_token_id: int | None = None, batch_size: int = 32
) -> Tensor:
    """Tokens emitted by one greedy linear cycle from each true prefix, bonus token included.

    Judges a drafter on real contexts: greedy continuations of small models fall into loops that flatter it.
    prefixes [N, P]: true tokens; the first P - 1 are cached, the last one is the seed. A draft adapter, if attached,
    drafts. batch_size: prefixes decoded together. Returns [N] int64 with values 1..block_length.

    Raises:
        ValueError: prefixes or block_length cannot be decoded.
    """
    options = DecodeOptions(
        max_new_tokens=block_length, block_length=block_length, mask_token_id=mask_token_id, eos_token_id=()
    )
    counts = []
    for batch in prefixes.split(batch_size):
        session = DecodeSession(model, batch, None, options)
        tokens = session.prompt.tokens
        if tokens.shape[1] > 1:
            session.encode_context("prefill", tokens[:, :-1])
        verdict, _ = run_linear_cycle(session, tokens[:, -1:], block_length)
        counts.append(verdict.num_accepted + 1)
    return torch.cat(counts)

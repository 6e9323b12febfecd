"""Self-speculation: the diffusion mode drafts tokens, the AR mode verifies them.

Linear and quadratic speculation share one loop: a cycle drafts and verifies, and emits what was accepted and the
verifier's own token. Linear speculation spends two forwards on a cycle, quadratic speculation one.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .layers import ALL_POSITIONS, DraftAdapter, check_adapter_loaded
from .options import LINEAR, DecodeOptions, DecodeResult
from .sampling import Draft, DraftVerification
from .session import DecodeSession, cut_at_stop, open_session

PROBE_TOKENS = 8  # before the seed of measure_adapter_effect
logger = logging.get_logger(__name__)

# Maps a seed [B, 1] and the most tokens wanted to a verified draft after the seed and the number of its proposals [B].
Cycle = Callable[[Tensor, int], tuple[DraftVerification, Tensor]]


@torch.no_grad()
def decode_linear_speculation(
    model: Any,
    prompt_ids: Tensor,
    options: DecodeOptions,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> DecodeResult:
    """Draft up to block_length - 1 tokens in one forward, verify them causally in another, emit 1..block_length.

    Greedy output equals greedy AR token for token; with a temperature it has AR's distribution. A draft adapter, if
    attached, is on for drafts only. The last blocks are as long as what is left, and one of length 1 is not drafted.
    threshold: a draft ends before the first position whose best token has a lower probability (temperature 1); 0
    sends all of it to verification. It saves verified positions and never changes what is emitted under greedy
    decoding, nor its distribution otherwise: the cut does not look at the token drawn.
    prompt_ids [B, P]; attention_mask [B, P], zero on left padding. The streamer gets the prefill's token, then what
    each cycle accepted.

    Raises:
        ValueError: prompts or options that cannot be decoded, or several prompts for one streamer.
    """
    session = open_session(model, LINEAR, prompt_ids, attention_mask, options, inputs_embeds)
    return run_cycles(session, session.prefill, lambda seed, length: run_linear_cycle(session, seed, length))


def run_linear_cycle(session: DecodeSession, seed: Tensor, length: int) -> tuple[DraftVerification, Tensor]:
    """Draft and verify a block of `length` tokens that begins with seed [B, 1]; commit nothing to the cache."""
    draft = draft_block(session, seed, length)
    return verify_draft(session, seed, draft), count_proposed(session, draft)


def draft_block(session: DecodeSession, seed: Tensor, length: int) -> Draft:
    """Propose length - 1 tokens after seed [B, 1] in one bidirectional forward.

    A batch drafts as much as its longest draft above the threshold: less would save nothing.
    """
    if length == 1:
        return make_empty_draft(session, seed)
    model = session.model
    block = seed.new_full((len(seed), length), model.mask_token_id)
    block[:, :1] = seed
    hidden = model.encode("draft", block, model.layout(length, bidirectional=True), drafting=ALL_POSITIONS)
    threshold = session.options.threshold or 0.0
    draft = session.sampler.draft(model.project(hidden[:, 1:]), with_confidence=threshold > 0)
    if draft.confidence is None:
        return draft
    return draft.cut(int((draft.confidence >= threshold).long().cumprod(1).sum(1).max()))


def make_empty_draft(session: DecodeSession, seed: Tensor) -> Draft:
    """Return a draft that proposes nothing after seed [B, 1]."""
    nothing = seed[:, :0]
    if session.sampler.is_greedy:
        return Draft(nothing, None, nothing.float())
    probabilities = torch.zeros(len(seed), 0, session.model.vocab_size, device=seed.device)
    return Draft(nothing, probabilities, nothing.float())


def verify_draft(session: DecodeSession, seed: Tensor, draft: Draft) -> DraftVerification:
    """Verify a draft in one causal forward over seed [B, 1] and draft."""
    tokens = torch.cat((seed, draft.tokens), dim=1)
    hidden = session.model.encode("verify", tokens, session.model.layout(tokens.shape[1]))
    return session.verify(session.model.project(hidden), draft)


def count_proposed(session: DecodeSession, draft: Draft) -> Tensor:
    """Count the tokens of a draft [B] that are proposals."""
    return (draft.tokens != session.model.mask_token_id).sum(1)


def run_cycles(session: DecodeSession, prefill: Callable[[], Tensor], run_cycle: Cycle) -> DecodeResult:
    """Prefill (yields the first tokens [B, 1]), then run cycles until all sequences have stopped or are full.

    Sequences accept different numbers of tokens, so each has its own length in the cache. One that has finished stays
    where it is while the others go on.
    """
    max_new_tokens, stop_ids = session.options.max_new_tokens, session.stop_ids
    seed = prefill()
    new_tokens: list[list[int]] = seed.tolist()
    session.stream.put(new_tokens[0])
    acceptance_lengths: list[int] = []
    num_proposed = num_committed = 0
    while left := _count_left(new_tokens, max_new_tokens, stop_ids):
        length = session.block_length if session.model.fixed_shapes else min(session.block_length, max(left))
        verification, proposals = run_cycle(seed, length)
        # The only transfer to the host in a cycle (apart from a threshold's): the tokens and how many count.
        columns = (verification.tokens, verification.num_accepted[:, None], proposals[:, None])
        commits = [0] * len(new_tokens)
        for index, (*tokens, accepted, proposed) in enumerate(torch.cat(columns, dim=1).tolist()):
            if left[index] == 0:
                continue
            emitted = cut_at_stop(tokens[: min(accepted + 1, left[index])], stop_ids)
            new_tokens[index] += emitted
            commits[index] = accepted + 1
            acceptance_lengths.append(len(emitted))
            num_proposed += proposed
            num_committed += min(accepted, len(emitted))
            session.stream.put(emitted)
        session.model.cache.advance(commits)
        seed = verification.bonus()
    return session.finish(_stack(new_tokens, seed.device), num_proposed, num_committed, acceptance_lengths)


def _count_left(new_tokens: list[list[int]], max_new_tokens: int, stop_ids: tuple[int, ...]) -> list[int]:
    """Count the tokens each sequence still has to emit; return an empty list when none has any left."""
    left = [0 if tokens[-1] in stop_ids else max_new_tokens - len(tokens) for tokens in new_tokens]
    return left if any(left) else []


def _stack(new_tokens: list[list[int]], device: torch.device) -> Tensor:
    """Return [B, T], with sequences that stopped early filled up with their last token, a stop id."""
    length = max(len(tokens) for tokens in new_tokens)
    return torch.tensor([tokens + tokens[-1:] * (length - len(tokens)) for tokens in new_tokens], device=device)


@torch.no_grad()
def real_context_acceptance(
    model: Any, prefixes: Tensor, block_length: int, mask_token_id: int | None = None, batch_size: int = 32
) -> Tensor:
    """Count the tokens emitted by one greedy linear cycle from each true prefix, bonus token included.

    This judges a drafter on real contexts: greedy continuations of small models fall into loops that flatter it. A
    draft adapter, if attached, drafts.

    Args:
        model: a NemotronLabsDiffusionModel.
        prefixes: [N, P] true tokens; the first P - 1 are cached, the last one is the seed.
        block_length: tokens of the cycle's block, seed included.
        mask_token_id: None takes the config's.
        batch_size: prefixes decoded together.

    Returns:
        [N] int64 with values 1..block_length.

    Raises:
        ValueError: prefixes or block_length cannot be decoded.
    """
    options = DecodeOptions(
        max_new_tokens=block_length, block_length=block_length, mask_token_id=mask_token_id, eos_token_id=()
    )
    counts = []
    for batch in prefixes.split(batch_size):
        session = open_session(model, LINEAR, batch, None, options)
        tokens = session.prompt.tokens
        if tokens.shape[1] > 1:
            session.model.encode_context("prefill", tokens[:, :-1])
        verification, _ = run_linear_cycle(session, tokens[:, -1:], block_length)
        counts.append(verification.num_accepted + 1)
    return torch.cat(counts)


@dataclass(frozen=True)
class AdapterEffect:
    """By how much a draft adapter changes a draft.

    Attributes:
        mean: of the absolute change of the draft's logits.
        largest: of these changes.
        changed: drafted tokens that are others.
        drafted: all of them.
    """

    mean: float
    largest: float
    changed: int
    drafted: int

    def __str__(self) -> str:
        """Say it as the end of a sentence about the adapter."""
        return (
            f"changes the logits of a probe's draft by {self.mean:.3g} on average, at most {self.largest:.3g}, and "
            f"{self.changed} of its {self.drafted} tokens"
        )


@torch.no_grad()
def measure_adapter_effect(model: Any) -> AdapterEffect:
    """Draft one block after the same few tokens with and without the draft adapters, and compare the logits.

    model: a NemotronLabsDiffusionModel with a draft adapter that is on. Raises ValueError if it cannot decode.
    """
    config = model.config
    tokens = torch.arange(1, PROBE_TOKENS + 2, device=model.device) * 7919 % config.vocab_size
    tokens[tokens == config.mask_token_id] = (config.mask_token_id + 1) % config.vocab_size
    logits = []
    for context in (nullcontext(), DraftAdapter(model).suspended()):
        with context:
            session = open_session(model, LINEAR, tokens[None], None, DecodeOptions(eos_token_id=()))
            session.model.encode_context("prefill", tokens[None, :-1])
            block = tokens.new_full((1, session.block_length), session.model.mask_token_id)
            block[0, 0] = tokens[-1]
            layout = session.model.layout(session.block_length, bidirectional=True)
            hidden = session.model.encode("draft", block, layout, drafting=ALL_POSITIONS)
            logits.append(session.model.project(hidden[0, 1:]).float())
    change = (logits[0] - logits[1]).abs()
    change[:, config.mask_token_id] = 0.0  # it is never drafted: infinity less infinity
    changed = (logits[0].argmax(-1) != logits[1].argmax(-1)).sum()
    return AdapterEffect(change.mean().item(), change.max().item(), int(changed), len(change))


def check_adapter_effect(model: Any, adapter: str) -> None:
    """Refuse an adapter that was just loaded and changes nothing, and log what a draft adapter changes.

    Raises:
        ValueError: it changes nothing.
    """
    check_adapter_loaded(model, adapter)
    if not DraftAdapter(model):
        return
    effect = measure_adapter_effect(model)
    if not effect.largest:
        raise ValueError(
            f"the adapter {adapter!r} changes nothing: a draft has the same logits without it. Its scale, lora_alpha / "
            "r, or its weights are zero"
        )
    logger.info(f"the draft adapter {adapter!r} {effect}")

"""Linear self-speculation: the diffusion mode drafts a block, the AR mode verifies it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .decoding_nemotron_labs_diffusion import open_session
from .sampling_nemotron_labs_diffusion import (
    Draft,
    Verdict,
    choose_tokens,
    compute_confidence,
    compute_probabilities,
    draw,
    verify,
)
from .session_nemotron_labs_diffusion import (
    DecodeResult,
    DecodeSession,
    check_decode_arguments,
    finish,
    prepare_prompt,
    resolve_stop_ids,
)
from .streaming_nemotron_labs_diffusion import TokenStream, cut_at_stop


@torch.no_grad()
def decode_linear_speculation(
    model: Any,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    block_length: int,
    threshold: float,
    temperature: float,
    mask_token_id: int | None,
    eos_token_id: int | Iterable[int] | None,
    streamer: BaseStreamer | None = None,
) -> DecodeResult:
    """Draft up to block_length - 1 tokens in one forward, verify them causally in another, emit 1..block_length.

    Greedy output equals greedy AR token for token; with a temperature it has AR's distribution. A draft adapter, if
    attached, is on for drafts only. The last blocks are as long as what is left, and one of length 1 is not drafted.
    threshold: a draft ends before the first position whose best token has a lower probability (temperature 1); 0
    sends all of it to verification. It saves verified rows and never changes what is emitted under greedy decoding,
    nor its distribution otherwise: the cut does not look at the token drawn.
    prompt_ids [1, P]; mask_token_id: None takes the config's; eos_token_id: None takes the config's, [] never stops.
    streamer: gets the prefill's token, then what each cycle accepted (see TokenStream).

    Raises:
        ValueError: an argument no decode can serve, or more than one prompt.
    """
    check_decode_arguments(
        max_new_tokens=max_new_tokens, temperature=temperature, block_length=block_length, threshold=threshold
    )
    prompt_ids = prepare_prompt(model, prompt_ids)
    if len(prompt_ids) != 1:
        raise ValueError(
            f"linear self-speculation takes one prompt at a time, got {len(prompt_ids)}: rows would accept different "
            "numbers of tokens; call it per prompt, or use ar_generate or generate for batches"
        )
    stop_ids = resolve_stop_ids(model.config, eos_token_id)
    session = open_session(model, prompt_ids, max_new_tokens, mask_token_id)
    stream = TokenStream(streamer, prompt_ids)
    with session.adapter.suspended():
        seed = choose_tokens(session.forward(prompt_ids, rows=1), temperature)
        new_tokens: list[int] = seed[0].tolist()
        stream.put(new_tokens, stop_ids)
        acceptance_lengths: list[int] = []
        while len(new_tokens) < max_new_tokens and new_tokens[-1] not in stop_ids:
            length = min(block_length, max_new_tokens - len(new_tokens))
            verdict = run_cycle(session, seed, length, threshold, temperature)
            # The only transfer to the host in a cycle (apart from a threshold's): the tokens and how many count.
            *tokens, num_accepted = torch.cat((verdict.tokens[0], verdict.num_accepted)).tolist()
            emitted = cut_at_stop(tokens[: num_accepted + 1], stop_ids)
            new_tokens += emitted
            stream.put(emitted, stop_ids)
            acceptance_lengths.append(len(emitted))
            session.cache.crop(session.cache.length - len(tokens) + 1 + num_accepted)
            seed = verdict.tokens[:, num_accepted : num_accepted + 1]
    stream.end()
    emitted_ids = torch.tensor([new_tokens], device=prompt_ids.device)
    return finish(session, prompt_ids, emitted_ids, stop_ids, acceptance_lengths)


def run_cycle(session: DecodeSession, seed: Tensor, length: int, threshold: float, temperature: float) -> Verdict:
    """Draft and verify a block of `length` tokens that begins with seed [N, 1]; all of it is left in the cache."""
    draft = draft_block(session, seed, length, threshold, temperature)
    logits = session.forward(torch.cat((seed, draft.tokens), dim=1), rows=0)
    return verify(draft, logits, temperature)


def draft_block(session: DecodeSession, seed: Tensor, length: int, threshold: float, temperature: float) -> Draft:
    """Propose length - 1 tokens after seed [N, 1] in one bidirectional forward; the cache is only read.

    threshold: as in decode_linear_speculation; over a batch the longest draft decides.
    """
    block = seed.new_full((len(seed), length), session.mask_token_id)
    block[:, :1] = seed
    if length == 1:
        logits = session.model.get_input_embeddings().weight.new_empty(len(seed), 0, session.model.config.vocab_size)
    else:
        with session.adapter.active():
            logits = session.forward(block, rows=slice(1, None), bidirectional=True, commit=False)
    if threshold > 0:
        confident = compute_confidence(logits, logits.argmax(-1)) >= threshold
        logits = logits[:, : int(confident.long().cumprod(1).sum(1).max())]
    if temperature == 0:
        return Draft(logits.argmax(-1), None)
    probabilities = compute_probabilities(logits, temperature)
    return Draft(draw(probabilities), probabilities)


@torch.no_grad()
def real_context_acceptance(
    model: Any, prefixes: Tensor, block_length: int, mask_token_id: int | None = None, batch_size: int = 32
) -> Tensor:
    """Tokens emitted by one greedy draft-verify cycle from each true prefix, bonus token included.

    Judges a drafter on real contexts: greedy continuations of small models fall into loops that flatter it.
    prefixes [N, P]: true tokens; the first P - 1 are cached, the last one is the seed. A draft adapter, if attached,
    drafts. batch_size: prefixes decoded together. Returns [N] int64 with values 1..block_length.

    Raises:
        ValueError: prefixes or block_length cannot be decoded.
    """
    check_decode_arguments(max_new_tokens=block_length, temperature=0.0, block_length=block_length)
    counts = []
    for batch in prepare_prompt(model, prefixes).split(batch_size):
        session = open_session(model, batch, block_length, mask_token_id)
        with session.adapter.suspended():
            if batch.shape[1] > 1:
                session.forward(batch[:, :-1], rows=slice(0, 0))
            verdict = run_cycle(session, batch[:, -1:], block_length, threshold=0.0, temperature=0.0)
        counts.append(verdict.num_accepted + 1)
    return torch.cat(counts)

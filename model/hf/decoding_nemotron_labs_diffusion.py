"""Autoregressive and block-diffusion decoding, for batches of prompts of equal length."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from .sampling_nemotron_labs_diffusion import choose_tokens, compute_confidence
from .session_nemotron_labs_diffusion import (
    FIRST_CAPACITY,
    DecodeResult,
    DecodeSession,
    check_decode_arguments,
    finish,
    is_stop,
    prepare_prompt,
    resolve_mask_token_id,
    resolve_stop_ids,
)
from .streaming_nemotron_labs_diffusion import TokenStream


def open_session(
    model: Any, prompt_ids: Tensor, max_new_tokens: int, mask_token_id: int | None = None
) -> DecodeSession:
    """A session with room for the prompt and the first new tokens."""
    capacity = prompt_ids.shape[1] + min(max_new_tokens, FIRST_CAPACITY)
    return DecodeSession(model, resolve_mask_token_id(model.config, mask_token_id), capacity)


@torch.no_grad()
def decode_ar(
    model: Any,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: int | Iterable[int] | None,
    streamer: BaseStreamer | None = None,
) -> DecodeResult:
    """One token per forward; the prefill yields the first.

    prompt_ids [B, P]. A draft adapter, if attached, is not used. eos_token_id: None takes the config's, [] never stops.
    streamer: gets each token (see TokenStream).

    Raises:
        ValueError: an argument no decode can serve, or several prompts for one streamer.
    """
    check_decode_arguments(max_new_tokens=max_new_tokens, temperature=temperature)
    prompt_ids = prepare_prompt(model, prompt_ids)
    stream = TokenStream(streamer, prompt_ids)
    stop_ids = resolve_stop_ids(model.config, eos_token_id)
    session = open_session(model, prompt_ids, max_new_tokens)
    tokens, new_tokens = prompt_ids, []
    finished = torch.zeros(len(prompt_ids), 1, dtype=torch.bool, device=prompt_ids.device)
    with session.adapter.suspended():
        while len(new_tokens) < max_new_tokens:
            tokens = choose_tokens(session.forward(tokens, rows=1), temperature)
            new_tokens.append(tokens)
            stream.put(tokens, stop_ids)
            finished |= is_stop(tokens, stop_ids)
            if stop_ids and bool(finished.all()):
                break
    stream.end()
    return finish(session, prompt_ids, torch.cat(new_tokens, dim=1), stop_ids, [])


@torch.no_grad()
def decode_block_diffusion(
    model: Any,
    prompt_ids: Tensor,
    *,
    max_new_tokens: int,
    block_length: int,
    threshold: float,
    causal_context: bool,
    temperature: float,
    eos_token_id: int | Iterable[int] | None,
    streamer: BaseStreamer | None = None,
) -> DecodeResult:
    """Denoise one block after another, several tokens per forward.

    With causal_context (how these models are trained and served) the prompt is encoded causally and yields the first
    token of the block, its seed; the rest starts masked. Every forward over the block is bidirectional and commits
    each masked position whose confidence reaches `threshold`, at least the best one of each row. A full block is
    written to the cache by one causal forward, which yields the next seed. Without causal_context the model is a pure
    diffusion model: prompt and full blocks are encoded bidirectionally, yield no token, and blocks start all masked.
    The last block is as long as what is left. Confidence is the probability at temperature 1, whatever `temperature`.
    prompt_ids [B, P]; a draft adapter, if attached, is not used; eos_token_id: None takes the config's, [] never stops.
    streamer: gets each block when it is full (see TokenStream).

    Raises:
        ValueError: an argument no decode can serve, or several prompts for one streamer.
    """
    check_decode_arguments(
        max_new_tokens=max_new_tokens, temperature=temperature, block_length=block_length, threshold=threshold
    )
    prompt_ids = prepare_prompt(model, prompt_ids)
    stream = TokenStream(streamer, prompt_ids)
    stop_ids = resolve_stop_ids(model.config, eos_token_id)
    session = open_session(model, prompt_ids, max_new_tokens)
    finished = torch.zeros(len(prompt_ids), 1, dtype=torch.bool, device=prompt_ids.device)
    context, blocks, num_new = prompt_ids, [], 0
    with session.adapter.suspended():
        while True:
            seed = _encode_context(session, context, causal_context, temperature)
            length = min(block_length, max_new_tokens - num_new)
            block, masked = _start_block(seed, length, session.mask_token_id, stop_ids)
            context = _denoise(session, block, masked & ~finished, threshold, temperature, stop_ids)
            blocks.append(context)
            stream.put(context, stop_ids)
            num_new += length
            finished |= is_stop(context, stop_ids).any(1, keepdim=True)
            if num_new == max_new_tokens or (stop_ids and bool(finished.all())):
                break
    stream.end()
    return finish(session, prompt_ids, torch.cat(blocks, dim=1), stop_ids, [])


def _encode_context(session: DecodeSession, context: Tensor, causal: bool, temperature: float) -> Tensor:
    """Write context [B, N] to the cache; returns the seeds [B, 1] it yields, none [B, 0] if bidirectional."""
    logits = session.forward(context, rows=1 if causal else slice(0, 0), bidirectional=not causal)
    return choose_tokens(logits, temperature)


def _start_block(seed: Tensor, length: int, mask_token_id: int, stop_ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A block [B, length] that begins with seed [B, 0 or 1], and the bitmap of positions still to be denoised."""
    block = seed.new_full((len(seed), length), mask_token_id)
    block[:, : seed.shape[1]] = seed
    masked = torch.ones_like(block, dtype=torch.bool)
    masked[:, : seed.shape[1]] = False
    return block, masked & ~_behind_stop(block, stop_ids)


def _behind_stop(block: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """Positions of block [B, N] at or behind a stop token: they are cut from the output and need no denoising."""
    return is_stop(block, stop_ids).cumsum(1) > 0


def _denoise(
    session: DecodeSession,
    block: Tensor,
    masked: Tensor,
    threshold: float,
    temperature: float,
    stop_ids: tuple[int, ...],
) -> Tensor:
    """Fill the masked positions of block [B, N], forward by forward; the cached prefix is only read."""
    while bool(masked.any()):
        logits = session.forward(block, rows=masked, bidirectional=True, commit=False)
        tokens = choose_tokens(logits, temperature)
        proposed = block.masked_scatter(masked, tokens)
        confidence = torch.zeros(block.shape, dtype=torch.float32, device=block.device)
        confidence.masked_scatter_(masked, compute_confidence(logits, tokens).float())
        chosen = masked & (confidence >= threshold)
        best = confidence.where(masked, -1.0).argmax(1, keepdim=True)
        chosen |= masked & torch.zeros_like(masked).scatter(1, best, True)
        block = torch.where(chosen, proposed, block)
        masked = masked & ~chosen & ~_behind_stop(block, stop_ids)
    return block

"""All modes behind one function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .options import AR, BLOCK_DIFFUSION, BLOCK_DIFFUSION_THRESHOLD, LINEAR, MODES, QUADRATIC, DecodeOptions
from .quadratic import decode_quadratic_speculation
from .sampling import compute_confidence
from .session import DecodeResult, DecodeSession, is_stop
from .speculation import decode_linear_speculation


@torch.no_grad()
def decode_ar(
    model: Any, prompt_ids: Tensor, options: DecodeOptions, attention_mask: Tensor | None = None
) -> DecodeResult:
    """One token per forward; the prefill yields the first. A draft adapter, if attached, is not used.

    prompt_ids [B, P]; attention_mask [B, P], zero on left padding. The streamer gets each token.

    Raises:
        ValueError: prompts or options that cannot be decoded, or several prompts for one streamer.
    """
    session = DecodeSession(model, prompt_ids, attention_mask, options)
    tokens = session.prefill()
    new_tokens = [tokens]
    session.stream.put(tokens, session.stop_ids)
    finished = is_stop(tokens, session.stop_ids)
    while len(new_tokens) < options.max_new_tokens and not (session.stop_ids and bool(finished.all())):
        tokens = session.choose_next(session.encode_context("step", tokens))
        new_tokens.append(tokens)
        session.stream.put(tokens, session.stop_ids)
        if session.stop_ids:
            finished |= is_stop(tokens, session.stop_ids)
    return session.finish(torch.cat(new_tokens, dim=1), [])


@torch.no_grad()
def decode_block_diffusion(
    model: Any, prompt_ids: Tensor, options: DecodeOptions, attention_mask: Tensor | None = None
) -> DecodeResult:
    """Denoise one block after another, several tokens per forward. A draft adapter, if attached, is not used.

    With causal_context (how these models are trained and served) the prompt is encoded causally and yields the first
    token of the block, its seed; the rest starts masked. Every forward over the block is bidirectional and commits
    each masked position whose confidence reaches the threshold, at least the best one of each row. A full block is
    written to the cache by one causal forward, which yields the next seed. Without causal_context the model is a pure
    diffusion model: prompt and full blocks are encoded bidirectionally, yield no token, and blocks start all masked.
    The last block is as long as what is left. Confidence is the probability at temperature 1, whatever the temperature.
    prompt_ids [B, P]; attention_mask [B, P], zero on left padding. The streamer gets each block when it is full.

    Raises:
        ValueError: prompts or options that cannot be decoded, or several prompts for one streamer.
    """
    session = DecodeSession(model, prompt_ids, attention_mask, options)
    finished = torch.zeros(session.batch_size, 1, dtype=torch.bool, device=session.device)
    seed = _encode(session, "prefill", session.prompt.tokens, session.prompt.lengths)
    blocks: list[Tensor] = []
    num_left = options.max_new_tokens
    while True:
        block = _denoise_block(session, seed, min(session.block_length, num_left), finished)
        blocks.append(block)
        session.stream.put(block, session.stop_ids)
        num_left -= block.shape[1]
        finished |= is_stop(block, session.stop_ids).any(1, keepdim=True)
        if num_left == 0 or (session.stop_ids and bool(finished.all())):
            return session.finish(torch.cat(blocks, dim=1), [])
        seed = _encode(session, "commit", block)


def _encode(session: DecodeSession, kind: str, tokens: Tensor, counts: list[int] | None = None) -> Tensor:
    """Write tokens [B, N] to the cache; returns the seeds [B, 1] they yield, none [B, 0] if encoded bidirectionally."""
    causal = session.options.causal_context
    hidden = session.encode_context(kind, tokens, counts, bidirectional=not causal)
    return session.choose_next(hidden) if causal else tokens[:, :0]


def _denoise_block(session: DecodeSession, seed: Tensor, length: int, finished: Tensor) -> Tensor:
    """A block [B, length] that begins with seed [B, 0 or 1], filled; rows that have finished [B, 1] are left masked."""
    block = seed.new_full((len(seed), length), session.mask_token_id)
    block[:, : seed.shape[1]] = seed
    masked = torch.ones_like(block, dtype=torch.bool)
    masked[:, : seed.shape[1]] = False
    masked &= ~finished & ~_behind_stop(session, block)
    while True:
        block, masked = _denoise(session, block, masked)
        # A row that thinks too long is closed there, and what it wrote behind is written anew.
        drafted = block[:, seed.shape[1] :]
        overrun = session.thinking.find_overrun(drafted) & ~finished
        overrun &= overrun.cumsum(1) == 1
        if session.options.thinking_budget is None or not bool(overrun.any()):
            session.thinking.keep(drafted)
            return block
        drafted.masked_fill_(overrun, session.thinking.close_id)
        masked[:, seed.shape[1] :] = (overrun.cumsum(1) > 0) & ~overrun
        block.masked_fill_(masked, session.mask_token_id)
        masked &= ~_behind_stop(session, block)


def _behind_stop(session: DecodeSession, block: Tensor) -> Tensor:
    """Positions of block [B, N] at or behind a stop token: they are cut from the output and need no denoising."""
    return is_stop(block, session.stop_ids).cumsum(1) > 0


def _denoise(session: DecodeSession, block: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the masked positions of block [B, N], forward by forward; the cached prefix is only read."""
    threshold = BLOCK_DIFFUSION_THRESHOLD if session.options.threshold is None else session.options.threshold
    layout = session.layout(block.shape[1], bidirectional=True)
    while len((rows := masked.nonzero(as_tuple=True))[0]):  # the one transfer to the host in a forward
        hidden = session.encode("denoise", block, layout)
        logits = session.project(hidden[rows])
        tokens = session.sampler.choose(logits)
        confidence = torch.full(block.shape, -1.0, dtype=torch.float32, device=block.device)
        confidence[rows] = compute_confidence(logits, tokens).float()
        chosen = masked & (confidence >= threshold)
        chosen |= masked & torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True)
        block = torch.where(chosen, block.index_put(rows, tokens), block)
        session.num_proposed += len(tokens)
        session.num_committed = session.num_committed + chosen.sum()
        masked = masked & ~chosen & ~_behind_stop(session, block)
    return block, masked


DECODERS: dict[str, Callable[..., DecodeResult]] = {
    AR: decode_ar,
    BLOCK_DIFFUSION: decode_block_diffusion,
    LINEAR: decode_linear_speculation,
    QUADRATIC: decode_quadratic_speculation,
}


def decode(
    model: Any, mode: str, prompt_ids: Tensor, options: DecodeOptions, attention_mask: Tensor | None = None
) -> DecodeResult:
    """Decode prompt_ids [B, P] in one of MODES; attention_mask [B, P], zero on left padding.

    Raises:
        ValueError: an unknown mode, or prompts or options that cannot be decoded.
    """
    if mode not in DECODERS:
        raise ValueError(f"there is no mode {mode!r}: choose {', '.join(MODES)}")
    return DECODERS[mode](model, prompt_ids, options, attention_mask)

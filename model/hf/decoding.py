"""One function for all decoding modes, and the two modes that do not speculate: AR and block diffusion."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .options import (
    AR,
    BLOCK_DIFFUSION,
    LINEAR,
    MODES,
    QUADRATIC,
    DecodeOptions,
    DecodeResult,
    make_options,
)
from .quadratic import decode_quadratic_speculation
from .sampling import compute_confidence
from .session import DecodeSession, open_session
from .speculation import decode_linear_speculation

IMAGES = ("pixel_values", "image_sizes")  # as a processor returns them


@torch.no_grad()
def decode_ar(
    model: Any,
    prompt_ids: Tensor,
    options: DecodeOptions,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> DecodeResult:
    """Decode one token per forward, the first one in the prefill. A draft adapter, if attached, is not used.

    prompt_ids [B, P]; attention_mask [B, P], zero on left padding. The streamer gets each token.

    Raises:
        ValueError: prompts or options that cannot be decoded, or several prompts for one streamer.
    """
    session = open_session(model, AR, prompt_ids, attention_mask, options, inputs_embeds)
    tokens = session.prefill()
    new_tokens = [tokens]
    session.stream.put(tokens)
    finished = session.is_stop(tokens)
    while len(new_tokens) < options.max_new_tokens and not (session.stop_ids and bool(finished.all())):
        tokens = session.choose_next(session.model.encode_context("step", tokens))
        new_tokens.append(tokens)
        session.stream.put(tokens)
        if session.stop_ids:
            finished |= session.is_stop(tokens)
    return session.finish(torch.cat(new_tokens, dim=1))


@torch.no_grad()
def decode_block_diffusion(
    model: Any,
    prompt_ids: Tensor,
    options: DecodeOptions,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> DecodeResult:
    """Denoise one block after another, several tokens per forward. A draft adapter, if attached, is not used.

    With causal_context (how these models are trained and served) the prompt is encoded causally and yields the first
    token of the block, its seed; the rest starts masked. Every forward over the block is bidirectional and commits
    each masked position whose confidence reaches the threshold, at least the best one of each sequence. A full block
    is written to the cache by one causal forward, which yields the next seed. Without causal_context the model is a
    pure diffusion model: prompt and full blocks are encoded bidirectionally, yield no token, and blocks start all
    masked. The last block is as long as what is left. A block with a stop token is full once nothing before that is
    masked. Confidence is the probability at temperature 1, whatever the temperature. prompt_ids [B, P];
    attention_mask [B, P], zero on left padding. The streamer gets each full block.

    Raises:
        ValueError: prompts or options that cannot be decoded, or several prompts for one streamer.
    """
    session = open_session(model, BLOCK_DIFFUSION, prompt_ids, attention_mask, options, inputs_embeds)
    finished = torch.zeros(len(prompt_ids), 1, dtype=torch.bool, device=session.model.device)
    seed = _encode(session, "prefill", session.prompt.tokens, session.prompt.lengths)
    blocks: list[Tensor] = []
    num_left, num_proposed, num_committed = options.max_new_tokens, 0, 0
    while True:
        block, proposed, committed = _denoise_block(session, seed, min(session.block_length, num_left), finished)
        num_proposed, num_committed = num_proposed + proposed, num_committed + committed
        blocks.append(block)
        session.stream.put(block)
        num_left -= block.shape[1]
        finished |= session.is_stop(block).any(1, keepdim=True)
        if num_left == 0 or (session.stop_ids and bool(finished.all())):
            return session.finish(torch.cat(blocks, dim=1), num_proposed, num_committed)
        seed = _encode(session, "commit", block)


def _encode(session: DecodeSession, kind: str, tokens: Tensor, counts: list[int] | None = None) -> Tensor:
    """Write tokens [B, N] to the cache and return the seeds [B, 1] they yield, [B, 0] if encoded bidirectionally."""
    causal = session.options.causal_context
    hidden = session.model.encode_context(kind, tokens, counts, bidirectional=not causal)
    return session.choose_next(hidden) if causal else tokens[:, :0]


def _denoise_block(
    session: DecodeSession, seed: Tensor, length: int, finished: Tensor
) -> tuple[Tensor, int, int | Tensor]:
    """Fill a block [B, length] that begins with seed [B, 0 or 1]; sequences that have finished [B, 1] stay masked.

    Returns:
        The block, how many tokens were predicted for it, and how many of them were committed.
    """
    block = seed.new_full((len(seed), length), session.model.mask_token_id)
    block[:, : seed.shape[1]] = seed
    masked = torch.ones_like(block, dtype=torch.bool)
    masked[:, : seed.shape[1]] = False
    written = block[:, seed.shape[1] :]
    closes = session.thinking.find_close(written.shape[1])
    written.masked_fill_(closes, session.thinking.close_id)
    masked[:, seed.shape[1] :] &= ~closes
    masked &= ~finished
    masked &= ~_find_settled(session, block, masked)
    num_proposed, num_committed = 0, 0
    while True:
        block, masked, proposed, committed = _denoise(session, block, masked)
        num_proposed, num_committed = num_proposed + proposed, num_committed + committed
        # A sequence that thinks too long is closed there, and what it wrote after that is denoised again.
        written = block[:, seed.shape[1] :]
        overrun = session.thinking.find_overrun(written) & ~finished & ~_find_after_stop(session, written)
        if not (session.thinking.has_limit and bool(overrun.any())):
            session.thinking.commit(written)
            return block, num_proposed, num_committed
        written.masked_fill_(overrun, session.thinking.close_id)
        masked[:, seed.shape[1] :] = (overrun.cumsum(1) > 0) & ~overrun
        block.masked_fill_(masked, session.model.mask_token_id)
        masked &= ~_find_settled(session, block, masked)


def _denoise(session: DecodeSession, block: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, int, int | Tensor]:
    """Fill the masked positions of block [B, N], forward by forward; the cached prefix is only read.

    Returns:
        The block, the positions still masked, how many tokens were predicted, and how many of them were committed.
    """
    threshold = session.options.threshold
    layout = session.model.layout(block.shape[1], bidirectional=True)
    num_proposed, num_committed = 0, 0
    while len((where := masked.nonzero(as_tuple=True))[0]):  # the one transfer to the host in a forward
        hidden = session.model.encode("denoise", block, layout)
        logits = session.model.project(hidden[where])
        tokens = session.sampler.choose(logits)
        confidence = torch.full(block.shape, -1.0, dtype=torch.float32, device=block.device)
        confidence[where] = compute_confidence(logits, tokens).float()
        chosen = masked & torch.zeros_like(masked).scatter(1, confidence.argmax(1, keepdim=True), True)
        if threshold is not None:
            chosen |= masked & (confidence >= threshold)
        block = torch.where(chosen, block.index_put(where, tokens), block)
        num_proposed, num_committed = num_proposed + len(tokens), num_committed + chosen.sum()
        masked = masked & ~chosen
        masked &= ~_find_settled(session, block, masked)
    return block, masked, num_proposed, num_committed


def _find_settled(session: DecodeSession, block: Tensor, masked: Tensor) -> Tensor:
    """Find the positions of block [B, N] that are cut off and need no denoising: after a stop token, [B, N] bool.

    While a position before the stop is masked, it reads those after it, unless denoise_after_stop is False.
    """
    after_stop = _find_after_stop(session, block)
    if not session.options.denoise_after_stop:
        return after_stop
    return after_stop & ~(masked & ~after_stop).any(1, keepdim=True)


def _find_after_stop(session: DecodeSession, block: Tensor) -> Tensor:
    """Find the positions of block [B, N] from the first stop token on."""
    return session.is_stop(block).cumsum(1) > 0


Decoder = Callable[..., DecodeResult]
DECODERS: dict[str, Decoder] = {
    AR: decode_ar,
    BLOCK_DIFFUSION: decode_block_diffusion,
    LINEAR: decode_linear_speculation,
    QUADRATIC: decode_quadratic_speculation,
}


def find_decoder(mode: str) -> Decoder:
    """Return the function that decodes in one of MODES. Raises: ValueError for an unknown one."""
    if mode not in DECODERS:
        raise ValueError(f"there is no mode {mode!r}: choose {', '.join(MODES)}")
    return DECODERS[mode]


def decode(
    model: Any,
    mode: str,
    prompt_ids: Tensor,
    options: DecodeOptions,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> DecodeResult:
    """Decode prompt_ids [B, P] in one of MODES; attention_mask [B, P], zero on left padding.

    inputs_embeds: [B, P, hidden] in place of the embeddings of prompt_ids, or None. Of prompts with images they are
    what the model's embed_prompt returns.

    Raises:
        ValueError: an unknown mode, prompts or options that cannot be decoded, or options without effect in the mode.
    """
    return find_decoder(mode)(model, prompt_ids, options, attention_mask, inputs_embeds)


@torch.no_grad()
def decode_request(
    model: Any, decoder: Decoder, prompt_ids: Tensor, attention_mask: Tensor | None, given: dict[str, Any]
) -> DecodeResult:
    """Decode as an entry point of the model was called.

    given: fields of DecodeOptions and, for prompts with images, pixel_values and image_sizes. prompt_ids [B, P];
    attention_mask [B, P], zero on left padding.

    Raises:
        ValueError: as the decoder, or images that the model cannot read.
        TypeError: other options.
    """
    images = {name: given.pop(name) for name in IMAGES if name in given}
    options = make_options(given)
    embeds = model.embed_prompt(prompt_ids, attention_mask, **images)
    return decoder(model, prompt_ids, options, attention_mask, embeds)

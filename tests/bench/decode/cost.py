"""Fits the cost of a forward, a + b * positions, and finds which way to decode is cheapest for which a / b.

On a device that waits for memory a dominates: reading the weights takes the same time for one position as for hundreds.
Where arithmetic is the limit b dominates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.hf.options import AR, DecodeOptions
from model.hf.session import open_session
from tests.bench.timing import time_interleaved

NUM_POSITIONS = (1, 2, 4, 8, 16, 32, 64, 128, 272)  # 272: all groups of a block of 16
PROMPT_TOKENS = 128
RATIOS = tuple(float(value) for value in np.logspace(0, 4, 401))  # a / b


@dataclass(frozen=True)
class Cost:
    """The seconds of a forward, fixed + per_position * positions. measured: seconds by number of positions."""

    fixed: float
    per_position: float
    measured: dict[int, float]

    @property
    def ratio(self) -> float:
        """The ratio a / b: how many positions cost as much as the forward itself."""
        return self.fixed / self.per_position


@torch.no_grad()
def measure_cost(model: Any, rounds: int) -> Cost:
    """Time forwards of various numbers of positions after a prompt; all positions pass the head."""
    prompt = torch.randint(0, model.config.mask_token_id, (1, PROMPT_TOKENS))
    session = open_session(
        model, AR, prompt, None, DecodeOptions(1, eos_token_id=[]), largest_forward=max(NUM_POSITIONS)
    )
    session.prefill()
    tokens = prompt.repeat(1, math.ceil(max(NUM_POSITIONS) / PROMPT_TOKENS))

    def make(num_positions: int) -> Any:
        cached = session.model
        layout = cached.layout(num_positions)
        return lambda: cached.project(cached.encode("cost", tokens[:, :num_positions], layout))

    seconds = time_interleaved([make(num_positions) for num_positions in NUM_POSITIONS], rounds)
    return fit(dict(zip(NUM_POSITIONS, seconds, strict=True)))


def fit(measured: Mapping[int, float]) -> Cost:
    """Fit by least squares of the relative error, so that small forwards count as much as large ones."""
    positions, seconds = np.array(list(measured)), np.array(list(measured.values()))
    terms = np.stack((np.ones_like(seconds), positions), axis=1) / seconds[:, None]
    (fixed, per_position), *_ = np.linalg.lstsq(terms, np.ones_like(seconds), rcond=None)
    return Cost(float(fixed), float(per_position), dict(measured))


def compute_speedup(figures: Mapping[str, Any], ratio: float) -> float:
    """Divide tokens per second by AR's, whose tokens cost a forward of one position each. ratio: a / b."""
    return (ratio + 1) / (ratio * figures["forwards_per_token"] + figures["positions_per_token"])


def find_winners(by_name: Mapping[str, Mapping[str, Any]], ratios: Sequence[float] = RATIOS) -> list[tuple[float, str]]:
    """List (a / b from which it is the fastest, name) in ascending order, over the grid of ratios."""
    winners: list[tuple[float, str]] = []
    for ratio in ratios:
        best = max(by_name, key=lambda name: compute_speedup(by_name[name], ratio))
        if not winners or winners[-1][1] != best:
            winners.append((ratio, best))
    return winners

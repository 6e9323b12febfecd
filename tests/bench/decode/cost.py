"""What a forward costs by its rows, a + b * rows, and which way to decode is cheapest for which a / b.

On a device that waits for memory a dominates: reading the weights takes the same time for one row as for hundreds.
Where arithmetic is the limit b does.
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

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 272)  # 272: all groups of a block of 16
PROMPT_TOKENS = 128
RATIOS = tuple(float(value) for value in np.logspace(0, 4, 401))  # a / b


@dataclass(frozen=True)
class Cost:
    """Seconds of a forward: fixed + per_row * rows. measured: by rows."""

    fixed: float
    per_row: float
    measured: dict[int, float]

    @property
    def ratio(self) -> float:
        """a / b: rows that cost as much as the forward itself."""
        return self.fixed / self.per_row


@torch.no_grad()
def measure_cost(model: Any, rounds: int) -> Cost:
    """Forwards of various numbers of rows behind a prompt, all rows through the head."""
    prompt = torch.randint(0, model.config.mask_token_id, (1, PROMPT_TOKENS))
    session = open_session(model, AR, prompt, None, DecodeOptions(1, eos_token_id=[]), largest_forward=max(ROWS))
    session.prefill()
    tokens = prompt.repeat(1, math.ceil(max(ROWS) / PROMPT_TOKENS))

    def make(num_rows: int) -> Any:
        cached = session.model
        layout = cached.layout(num_rows)
        return lambda: cached.project(cached.encode("cost", tokens[:, :num_rows], layout))

    seconds = time_interleaved([make(num_rows) for num_rows in ROWS], rounds)
    return fit(dict(zip(ROWS, seconds, strict=True)))


def fit(measured: Mapping[int, float]) -> Cost:
    """Least squares of the relative error, so that small forwards count as much as large ones."""
    rows, seconds = np.array(list(measured)), np.array(list(measured.values()))
    terms = np.stack((np.ones_like(seconds), rows), axis=1) / seconds[:, None]
    (fixed, per_row), *_ = np.linalg.lstsq(terms, np.ones_like(seconds), rcond=None)
    return Cost(float(fixed), float(per_row), dict(measured))


def compute_speedup(figures: Mapping[str, Any], ratio: float) -> float:
    """Tokens per second by those of AR, whose tokens cost a forward of one row each; ratio: a / b."""
    return (ratio + 1) / (ratio * figures["forwards_per_token"] + figures["rows_per_token"])


def find_winners(by_name: Mapping[str, Mapping[str, Any]], ratios: Sequence[float] = RATIOS) -> list[tuple[float, str]]:
    """(a / b from which it is the fastest, name) in ascending order, over the grid of ratios."""
    winners: list[tuple[float, str]] = []
    for ratio in ratios:
        best = max(by_name, key=lambda name: compute_speedup(by_name[name], ratio))
        if not winners or winners[-1][1] != best:
            winners.append((ratio, best))
    return winners

"""Every way to speculate, and prompts of different lengths."""

from typing import Any

import torch
from torch import Tensor

SPECULATIVE: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"threshold": 0.4}),
    ("quadratic", {}),
    ("quadratic", {"threshold": 0.4}),
    ("quadratic", {"mask_groups": 1}),
    ("quadratic", {"mask_groups": 2}),
    ("quadratic", {"mask_groups": 3, "threshold": 0.2}),
]
ALL = [("ar", {}), ("block_diffusion", {}), ("block_diffusion", {"causal_context": False, "threshold": 0.3})]
ALL += SPECULATIVE


def pad_left(prompts: Tensor, lengths: list[int], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Return prompt_ids and attention_mask [B, P] in which only the last `lengths` tokens of each prompt count."""
    width = prompts.shape[1]
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return prompts.where(mask, padding), mask.long()

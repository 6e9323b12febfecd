"""Whether decoded tokens are greedy AR's, as far as the dtype promises it."""

from typing import Any

import torch

from model.evaluate.records import Agreement
from model.evaluate.statistics import find_first_difference
from model.hf.adapter_nemotron_labs_diffusion import DraftAdapter

# Rounding may decide between tokens whose logits are this close; in float64 nothing is close enough.
TIE_MARGINS = {torch.float32: 1e-5, torch.float64: 0.0}


class AgreementJudge:
    """Compares tokens with those of greedy AR; looks at AR's logits only where they differ first."""

    def __init__(self, model: Any):
        self._model = model
        self._adapter = DraftAdapter(model)

    def compare(self, prompt_ids: list[int], ar: list[int], other: list[int]) -> Agreement:
        """ar, other: new tokens behind the prompt."""
        if ar == other:
            return Agreement.equal
        margin = TIE_MARGINS.get(self._model.get_input_embeddings().weight.dtype)  # an adapter need not share it
        if margin is None:
            return Agreement.rounded
        position = find_first_difference(ar, other)
        if position == min(len(ar), len(other)):
            return Agreement.different  # one ends where the other goes on
        gap = self._compute_gap([*prompt_ids, *ar[:position]], [ar[position], other[position]])
        return Agreement.tie if gap < margin else Agreement.different

    @torch.no_grad()
    def _compute_gap(self, token_ids: list[int], chosen: list[int]) -> float:
        """How far the worst of the chosen tokens' logits is below the best one that AR has behind `token_ids`."""
        with self._adapter.suspended():
            inputs = torch.tensor([token_ids], device=self._model.get_input_embeddings().weight.device)
            logits = self._model(input_ids=inputs, logits_to_keep=1).logits[0, 0]
        logits[self._model.config.mask_token_id] = -torch.inf  # AR never chooses it
        return float(logits.max() - logits[chosen].min())

"""One prompt decoded greedily in three modes, and whether speculation gave AR's tokens."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora.evaluation.records import (
    AR,
    LINEAR,
    LINEAR_ADAPTER,
    MODES,
    SPECULATIVE,
    Agreement,
    Decoded,
    DecodedPrompt,
    Prompt,
)
from model.hf.adapter_nemotron_labs_diffusion import DraftAdapter
from model.hf.decoding_nemotron_labs_diffusion import decode_ar
from model.hf.session_nemotron_labs_diffusion import DecodeResult
from model.hf.speculation_nemotron_labs_diffusion import decode_linear_speculation

# Rounding may decide between tokens whose logits are this close; in float64 nothing is close enough.
TIE_MARGINS = {torch.float32: 1e-5, torch.float64: 0.0}


class PromptDecoder:
    """Decodes prompts with one model, to which a draft adapter is attached."""

    def __init__(self, model: Any, *, max_new_tokens: int, block_length: int, stop_ids: tuple[int, ...]):
        """stop_ids: tokens that end an answer."""
        self._model = model
        self._adapter = DraftAdapter(model)
        self._block_length = block_length
        self._stop_ids = list(stop_ids)
        self._max_new_tokens = max_new_tokens

    def warm_up(self, prompt: Prompt) -> None:
        """Let libraries choose their kernels and allocate memory before anything is timed."""
        for mode in MODES:
            self._decode(mode, prompt, min(self._max_new_tokens, 2 * self._block_length))

    def decode(self, prompt: Prompt) -> DecodedPrompt:
        """All modes, one after the other, so that whatever else the machine does meets them alike."""
        decoded = {mode: self._decode(mode, prompt, self._max_new_tokens) for mode in MODES}
        agreements = {mode: self._compare(prompt, decoded[AR].tokens, decoded[mode].tokens) for mode in SPECULATIVE}
        return DecodedPrompt(prompt, decoded, agreements)

    def _decode(self, mode: str, prompt: Prompt, max_new_tokens: int) -> Decoded:
        prompt_ids = torch.tensor([prompt.token_ids])
        generate: dict[str, Callable[[Tensor, int], DecodeResult]] = {
            AR: self._decode_ar,
            LINEAR: self._decode_without_adapter,
            LINEAR_ADAPTER: self._decode_linear,
        }
        begin = time.perf_counter()
        result = generate[mode](prompt_ids, max_new_tokens)
        tokens = result.output_ids[0, prompt_ids.shape[1] :].tolist()  # waits for the device
        return Decoded(tokens, result.num_forwards, result.num_cycles, time.perf_counter() - begin)

    def _decode_ar(self, prompt_ids: Tensor, max_new_tokens: int) -> DecodeResult:
        return decode_ar(
            self._model, prompt_ids, max_new_tokens=max_new_tokens, temperature=0.0, eos_token_id=self._stop_ids
        )

    def _decode_linear(self, prompt_ids: Tensor, max_new_tokens: int) -> DecodeResult:
        return decode_linear_speculation(
            self._model,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            block_length=self._block_length,
            threshold=0.0,
            temperature=0.0,
            mask_token_id=None,
            eos_token_id=self._stop_ids,
        )

    def _decode_without_adapter(self, prompt_ids: Tensor, max_new_tokens: int) -> DecodeResult:
        with self._adapter.suspended():  # a decode that begins here finds no adapter to switch on
            return self._decode_linear(prompt_ids, max_new_tokens)

    def _compare(self, prompt: Prompt, ar: list[int], speculative: list[int]) -> Agreement:
        if ar == speculative:
            return Agreement.equal
        margin = TIE_MARGINS.get(self._embedding().dtype)
        if margin is None:
            return Agreement.rounded
        position = find_first_difference(ar, speculative)
        gap = self._compute_gap([*prompt.token_ids, *ar[:position]])
        return Agreement.tie if gap < margin else Agreement.different

    def _embedding(self) -> Tensor:
        """Of the model itself, whose dtype an adapter need not share."""
        return self._model.get_input_embeddings().weight

    @torch.no_grad()
    def _compute_gap(self, token_ids: list[int]) -> float:
        """Difference of the two best logits AR chooses from behind `token_ids`."""
        with self._adapter.suspended():
            inputs = torch.tensor([token_ids], device=self._embedding().device)
            logits = self._model(input_ids=inputs, logits_to_keep=1).logits[0, 0]
        logits[self._model.config.mask_token_id] = -torch.inf  # AR never chooses it
        best, second = logits.topk(2).values.tolist()
        return best - second


def find_first_difference(first: list[int], second: list[int]) -> int:
    """Index of the first differing token; the shorter length if one begins the other."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))

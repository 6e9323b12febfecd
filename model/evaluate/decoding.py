"""Prompts decoded in one mode, and what it cost."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conf.system.errors import UserError
from model.evaluate.options import EvaluationOptions
from model.evaluate.records import Decoded, Prompt, Variant
from model.hf.adapter_nemotron_labs_diffusion import DraftAdapter
from model.hf.decoding_nemotron_labs_diffusion import decode
from model.hf.options_nemotron_labs_diffusion import DecodeOptions

PADDING_ID = 0  # masked out, so any id will do


class Decoder:
    """Decodes batches of prompts with one model. A draft adapter that is attached drafts where a variant says so."""

    def __init__(
        self,
        model: Any,
        options: EvaluationOptions,
        *,
        stop_ids: Sequence[int],
        think_token_ids: tuple[int, int] | None = None,
    ):
        """stop_ids: tokens that end a response. think_token_ids: needed with a thinking budget."""
        self._model = model
        self._adapter = DraftAdapter(model)
        self._seed = options.seed
        self._options = DecodeOptions(
            max_new_tokens=options.max_new_tokens,
            block_length=options.block_length,
            threshold=options.threshold,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_token_id=list(stop_ids),
            mask_groups=options.mask_groups,
            thinking_budget=options.thinking_budget,
        )
        if think_token_ids is not None:
            self._options = replace(self._options, think_token_ids=think_token_ids)

    def decode(self, variant: Variant, prompts: Sequence[Prompt], *, number: int = 0, **changes: Any) -> Decoded:
        """Decode the prompts together. number: of the first one in the run, added to the seed. changes: of options.

        Raises: UserError naming the prompts if the decoder refuses them or the options.
        """
        if variant.threshold is not None:
            changes["threshold"] = variant.threshold
        if self._seed is not None:
            changes["seed"] = self._seed + number
        options = replace(self._options, **changes)
        prompt_ids, mask = pad_left([prompt.token_ids for prompt in prompts])
        # A decoder that starts inside finds no adapter to switch on.
        with nullcontext() if variant.with_adapter else self._adapter.suspended():
            begin = time.perf_counter()
            try:
                result = decode(self._model, variant.mode, prompt_ids, options, attention_mask=mask)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{prompts[0].place}: decoding {len(prompts)} prompts in mode {variant.mode} does not fit into the "
                    "memory of the device: lower --batch-size"
                ) from None
            except ValueError as error:
                raise UserError(f"{prompts[0].place}, mode {variant.mode}: {error}") from None
            output: list[list[int]] = result.output_ids[:, prompt_ids.shape[1] :].tolist()  # waits for the device
            seconds = time.perf_counter() - begin
        tokens = [row[:count] for row, count in zip(output, result.num_new_tokens, strict=True)]
        return Decoded(
            tokens,
            dict(result.forwards),
            result.num_rows,
            result.num_proposed,
            result.num_committed,
            list(result.acceptance_lengths),
            seconds,
        )


def pad_left(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, P] of the longest row, and the attention mask [B, P]; None if all rows are equally long."""
    width = max(map(len, rows))
    prompt_ids = torch.tensor([[PADDING_ID] * (width - len(row)) + row for row in rows])
    if all(len(row) == width for row in rows):
        return prompt_ids, None
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    return prompt_ids, (torch.arange(width) >= width - lengths).long()

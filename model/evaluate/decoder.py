"""Decodes batches of prompts in one variant after another and records what each call cost."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from conf.system.errors import UserError
from model.commands.decoding_options import choose_threshold
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt
from model.evaluate.variants import Variant
from model.export.images import load_pixels
from model.hf.decoding import decode
from model.hf.layers import DraftAdapter
from model.hf.options import DecodeOptions

PADDING_ID = 0  # the attention mask hides it, so any id will do
# Wraps a list of jobs in a progress bar.
Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Decoded:
    """The result of one decoder call for a batch of prompts.

    Attributes:
        tokens: the new tokens of each prompt, stop token included.
        forwards: model calls of the batch, by kind.
        num_positions: token positions that the layers computed, over all prompts.
        num_proposed: tokens predicted.
        num_committed: predicted tokens that entered the text.
        acceptance_lengths: tokens that each cycle of draft and verification emitted, the verifier's own included.
        seconds: time until all prompts were done, the vision tower's included.
    """

    tokens: list[list[int]]
    forwards: dict[str, int]
    num_positions: int
    num_proposed: int
    num_committed: int
    acceptance_lengths: list[int]
    seconds: float

    @property
    def num_forwards(self) -> int:
        """Model calls, the prefill included."""
        return sum(self.forwards.values())


class BatchDecoder:
    """Decodes batches of prompts with one model; an attached draft adapter drafts only in variants that ask for it."""

    def __init__(
        self,
        model: Any,
        options: EvaluationOptions,
        *,
        stop_ids: Sequence[int],
        think_token_ids: tuple[int, int] | None = None,
    ):
        """Store the model and its decoding options.

        Args:
            model: an export, with a draft adapter attached if a variant needs one.
            options: what all variants share.
            stop_ids: tokens that end a response.
            think_token_ids: ids of <think> and </think>; needed with a thinking budget.
        """
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

    def decode(
        self, variant: Variant, prompts: Sequence[EvaluationPrompt], *, number: int = 0, **changes: Any
    ) -> Decoded:
        """Decode the prompts together.

        Args:
            variant: mode, adapter and threshold.
            prompts: one batch.
            number: index of the batch's first prompt in the run; it is added to the seed.
            **changes: DecodeOptions that differ in this call.

        Raises:
            UserError: the decoder refuses the prompts or the options; the message names the first prompt.
        """
        threshold = self._options.threshold if variant.threshold is None else variant.threshold
        changes |= {
            "threshold": choose_threshold(variant.mode, threshold),
            "verifier_weight": variant.verifier_weight,
        }
        if self._seed is not None:
            changes["seed"] = self._seed + number
        options = replace(self._options, **changes).for_mode(variant.mode)
        prompt_ids, mask = pad_left([prompt.token_ids for prompt in prompts])
        # Within suspended() the decode loops find no adapter to switch on.
        with nullcontext() if variant.with_adapter else self._adapter.suspended():
            pixels = load_pixels(image for prompt in prompts for image in prompt.images)
            begin = time.perf_counter()
            try:
                embeds = self._model.embed_prompt(prompt_ids, mask, **pixels) if pixels else None
                result = decode(self._model, variant.mode, prompt_ids, options, mask, embeds)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"{prompts[0].place}: decoding {len(prompts)} prompts in mode {variant.mode} does not fit into the "
                    "memory of the device: lower --batch-size"
                ) from None
            except ValueError as error:
                raise UserError(f"{prompts[0].place}, mode {variant.mode}: {error}") from None
            output: list[list[int]] = result.output_ids[:, prompt_ids.shape[1] :].tolist()  # waits for the device
            seconds = time.perf_counter() - begin
        tokens = [ids[:count] for ids, count in zip(output, result.num_new_tokens, strict=True)]
        return Decoded(
            tokens,
            dict(result.forwards),
            result.num_positions,
            result.num_proposed,
            result.num_committed,
            list(result.acceptance_lengths),
            seconds,
        )


def decode_all(
    decoder: BatchDecoder,
    variants: Sequence[Variant],
    batches: Sequence[Sequence[EvaluationPrompt]],
    track: Track = iter,
) -> list[dict[str, Decoded]]:
    """Decode every batch in every variant; return per batch the results by the variant's name.

    Variants take turns, so that other load on the machine affects them alike.
    """
    first = list(accumulate((len(batch) for batch in batches), initial=0))
    decoded: list[dict[str, Decoded]] = [{} for _ in batches]
    for number, variant in track([(number, variant) for number in range(len(batches)) for variant in variants]):
        decoded[number][variant.name] = decoder.decode(variant, batches[number], number=first[number])
    return decoded


def pad_left(prompts: Sequence[list[int]]) -> tuple[Tensor, Tensor | None]:
    """Pad prompts on the left to the longest.

    Returns:
        Token ids [B, P] and the attention mask [B, P], which is None if all prompts are equally long.
    """
    width = max(map(len, prompts))
    prompt_ids = torch.tensor([[PADDING_ID] * (width - len(prompt)) + prompt for prompt in prompts])
    if all(len(prompt) == width for prompt in prompts):
        return prompt_ids, None
    lengths = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    return prompt_ids, (torch.arange(width) >= width - lengths).long()

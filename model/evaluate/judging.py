"""Judges responses: whether their tokens are greedy AR's, and whether their text contains an accepted answer.

Agreement. Equal tokens agree. In fp32 a first difference where AR's two best logits are closer than TIE_MARGINS is a
tie; in bf16 nothing is promised, and a difference counts as rounded.

Exact match. The whole response after </think> (if there is one) is compared; with a pattern, the first group (without
groups everything) of the pattern's last match, and a response without a match is wrong. Both sides are stripped, runs
of white space become one space, and a full stop at the end is ignored. If both sides are numbers, their values are
compared without "$", "%" and commas between thousands: "1,234.50" equals 1234.5. Case matters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from model.evaluate.decoder import Decoded
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt
from model.export.images import PromptImage, load_pixels
from model.export.load import THINK_TOKENS
from model.hf.layers import DraftAdapter
from model.hf.options import AR

# Rounding may decide between tokens whose logits are this close; in float64 nothing is close enough.
TIE_MARGINS = {torch.float32: 1e-5, torch.float64: 0.0}


class Agreement(Enum):
    """How a response compares with greedy AR's.

    tie: AR's two best logits are too close to call at the first difference.
    rounded: the responses differ, in a dtype of few bits that promises nothing.
    """

    equal = "equal"
    tie = "tie"
    rounded = "rounded"
    different = "different"


@dataclass(frozen=True)
class JudgedBatch:
    """Prompts that were decoded together in every variant; all dictionaries are keyed by the variant's name.

    Attributes:
        prompts: the batch, all of one group.
        decoded: what each variant decoded.
        agreements: agreement with greedy AR per prompt; empty if decoding is sampled.
        correct: per prompt whether the response gives an accepted answer, None for a prompt without answers; empty if
            no prompt has answers.
        texts: the response per prompt; empty unless they are to be written.
    """

    prompts: Sequence[EvaluationPrompt]
    decoded: dict[str, Decoded]
    agreements: dict[str, list[Agreement]]
    correct: dict[str, list[bool | None]]
    texts: dict[str, list[str]]

    @property
    def group(self) -> str:
        """The group of all its prompts."""
        return self.prompts[0].group


class BatchJudge:
    """Judges every response of a batch."""

    def __init__(self, model: Any, options: EvaluationOptions, tokenizer: PreTrainedTokenizerFast | None):
        self._agreement = AgreementJudge(model)
        self._options, self._tokenizer = options, tokenizer
        self._pattern = None if options.answer_pattern is None else re.compile(options.answer_pattern)

    def judge(self, prompts: Sequence[EvaluationPrompt], decoded: dict[str, Decoded]) -> JudgedBatch:
        """Compare with AR if decoding is greedy, score where there are answers, spell texts if they are wanted."""
        agreements, texts, correct = {}, {}, {}
        if self._options.is_greedy:
            agreements = {name: self._compare(prompts, decoded[AR], result) for name, result in decoded.items()}
        if any(prompt.answers for prompt in prompts):
            correct = {name: self._score(prompts, result) for name, result in decoded.items()}
        if self._options.keep_texts:
            texts = {name: [self._spell(tokens) for tokens in result.tokens] for name, result in decoded.items()}
        return JudgedBatch(prompts, decoded, agreements, correct, texts)

    def _compare(self, prompts: Sequence[EvaluationPrompt], ar: Decoded, other: Decoded) -> list[Agreement]:
        responses = zip(prompts, ar.tokens, other.tokens, strict=True)
        return [
            self._agreement.compare(prompt.token_ids, expected, tokens, prompt.images)
            for prompt, expected, tokens in responses
        ]

    def _spell(self, tokens: list[int]) -> str:
        tokenizer = require_tokenizer(self._tokenizer, "scoring or writing texts")
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    def _score(self, prompts: Sequence[EvaluationPrompt], result: Decoded) -> list[bool | None]:
        return [
            is_correct(self._spell(self._cut_thinking(tokens)), prompt.answers, self._pattern)
            if prompt.answers
            else None
            for prompt, tokens in zip(prompts, result.tokens, strict=True)
        ]

    def _cut_thinking(self, tokens: list[int]) -> list[int]:
        """Return the tokens after the last </think>."""
        end = require_tokenizer(self._tokenizer, "scoring").get_vocab().get(THINK_TOKENS[1])
        return tokens if end not in tokens else tokens[len(tokens) - tokens[::-1].index(end) :]


class AgreementJudge:
    """Compares tokens with greedy AR's; it runs the model only where the two first differ."""

    def __init__(self, model: Any):
        self._model = model
        self._adapter = DraftAdapter(model)

    def compare(
        self, prompt_ids: list[int], ar: list[int], other: list[int], images: Sequence[PromptImage] = ()
    ) -> Agreement:
        """Compare two responses to the same prompt, with its images. ar, other: the new tokens alone."""
        if ar == other:
            return Agreement.equal
        margin = TIE_MARGINS.get(self._model.get_input_embeddings().weight.dtype)  # an adapter may have another dtype
        if margin is None:
            return Agreement.rounded
        position = find_first_difference(ar, other)
        if position == min(len(ar), len(other)):
            return Agreement.different  # one ends where the other goes on
        gap = self._compute_gap([*prompt_ids, *ar[:position]], [ar[position], other[position]], images)
        return Agreement.tie if gap < margin else Agreement.different

    @torch.no_grad()
    def _compute_gap(self, token_ids: list[int], chosen: list[int], images: Sequence[PromptImage]) -> float:
        """Return how far the worst chosen token's logit lies below AR's best logit after `token_ids`."""
        with self._adapter.suspended():
            inputs = torch.tensor([token_ids], device=self._model.get_input_embeddings().weight.device)
            logits = self._model(input_ids=inputs, logits_to_keep=1, **load_pixels(images)).logits[0, 0]
        logits[self._model.config.mask_token_id] = -torch.inf  # AR never chooses it
        return float(logits.max() - logits[chosen].min())


def find_first_difference(first: list[int], second: list[int]) -> int:
    """Return the index of the first differing token; the shorter length if one begins the other."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def is_correct(text: str, answers: Sequence[str], pattern: re.Pattern[str] | None = None) -> bool:
    """Return whether a response matches one of the accepted answers."""
    given = extract_answer(text, pattern)
    return given is not None and normalize_answer(given) in {normalize_answer(answer) for answer in answers}


def extract_answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """Return the part of a response that is compared; None if the pattern does not match."""
    if pattern is None:
        return text
    matches = list(pattern.finditer(text))
    return matches[-1].group(1 if pattern.groups else 0) if matches else None


def normalize_answer(text: str) -> str | Decimal:
    """Return a number's value, or any other text in the form in which answers are compared."""
    stripped = " ".join(text.split()).removesuffix(".").rstrip()
    try:
        value = Decimal(re.sub(r"(?<=\d),(?=\d{3}\b)", "", stripped.removeprefix("$").removesuffix("%")))
    except InvalidOperation:
        return stripped
    return value if value.is_finite() else stripped


def require_tokenizer(tokenizer: PreTrainedTokenizerFast | None, what: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer; a caller who leaves it out where `what` needs it has made a mistake."""
    assert tokenizer is not None, f"{what} needs the tokenizer"
    return tokenizer

"""Scores the choices of questions in two ways: by AR's likelihood, and by masks in one forward.

AR's likelihood of a choice is the sum of the log-probabilities of its tokens, each after the prompt and the tokens
before it. Choices that share all tokens but the last share a sequence, so letters need the prompt alone.

The other way puts as many masks after the prompt as a choice has tokens and adds the log-probabilities of its tokens,
each at its own mask (score_masked_tokens). The masks know nothing of each other's tokens. Choices of equally many
tokens are read from the same forward; each further length is one more.

The choice with the highest sum is chosen. Draft adapters are not used, and the mask token has no probability.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conf.system.errors import UserError
from model.evaluate.choices import Choices
from model.evaluate.decoder import PADDING_ID, pad_left
from model.evaluate.prompts import EvaluationPrompt
from model.export.images import PromptImage, load_pixels
from model.hf.decision import score_masked_tokens
from model.hf.layers import DraftAdapter

WAYS = AR_LIKELIHOOD, MASKED = "ar_likelihood", "masked"


@dataclass(frozen=True)
class ChoiceScores:
    """How one way scored the choices of one question.

    Attributes:
        log_probabilities: of each choice, natural logarithms.
        num_forwards: model calls that served the question, alone or in its batch.
        num_positions: token positions that the layers computed for it, padding included.
    """

    log_probabilities: tuple[float, ...]
    num_forwards: int
    num_positions: int

    @property
    def chosen(self) -> int:
        """Index of the choice with the highest log-probability."""
        return self.log_probabilities.index(max(self.log_probabilities))


@dataclass(frozen=True)
class _Question:
    """A prompt that has choices."""

    token_ids: list[int]
    choices: Choices
    images: tuple[PromptImage, ...] = ()

    def find_choices(self, length: int) -> dict[int, tuple[int, ...]]:
        """Return the choices of `length` tokens by their index."""
        return {index: ids for index, ids in enumerate(self.choices.token_ids) if len(ids) == length}


class ChoiceScorer:
    """Scores the choices of batches of prompts with one model."""

    def __init__(self, model: Any, block_length: int):
        """Store the model, in eval mode, and the tokens of the longest canvas."""
        self._model = model
        self._adapter = DraftAdapter(model)
        self._block_length = block_length
        self._device: torch.device = model.get_input_embeddings().weight.device

    def score(self, prompts: Sequence[EvaluationPrompt]) -> list[dict[str, ChoiceScores]]:
        """Score the choices of each prompt by each of WAYS; empty for a prompt without choices. Raises: UserError."""
        questions = [_Question(p.token_ids, p.choices, p.images) for p in prompts if p.choices]
        if not questions:
            return [{} for _ in prompts]
        with torch.no_grad(), _memory_errors(prompts):
            by_way = zip(self._score_by_likelihood(questions), self._score_by_masks(questions), strict=True)
            scores = iter([{AR_LIKELIHOOD: likelihood, MASKED: masked} for likelihood, masked in by_way])
        return [next(scores) if prompt.choices else {} for prompt in prompts]

    def _score_by_likelihood(self, questions: Sequence[_Question]) -> list[ChoiceScores]:
        """Add AR's log-probabilities, all questions in one forward."""
        prefixes = [list(dict.fromkeys(ids[:-1] for ids in question.choices.token_ids)) for question in questions]
        asked = [(q, prefix) for q, own in zip(questions, prefixes, strict=True) for prefix in own]
        tables = iter(self._predict_next([q for q, _ in asked], [prefix for _, prefix in asked]))
        width = max(len(q.token_ids) + len(prefix) for q, prefix in asked)
        scores = []
        for question, own in zip(questions, prefixes, strict=True):
            table_of = {prefix: next(tables) for prefix in own}
            sums = [_add_up(table_of[ids[:-1]], ids) for ids in question.choices.token_ids]
            scores.append(ChoiceScores(tuple(sums), 1, len(own) * width))
        return scores

    def _predict_next(self, questions: Sequence[_Question], prefixes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return AR's log-probabilities [1 + prefix, vocab] after each prompt and after each token of its prefix."""
        prompts = [question.token_ids for question in questions]
        sequences = [[*prompt, *prefix] for prompt, prefix in zip(prompts, prefixes, strict=True)]
        lengths = [len(sequence) for sequence in sequences]
        width = max(lengths)
        # Padding comes last, where under causal attention nothing sees it.
        tokens = torch.tensor([ids + [PADDING_ID] * (width - len(ids)) for ids in sequences], device=self._device)
        slots = torch.arange(width, device=self._device)
        first, end = (torch.tensor(ns, device=self._device)[:, None] for ns in ([*map(len, prompts)], lengths))
        images = load_pixels(image for question in questions for image in question.images)
        with self._adapter.suspended():
            logits = self._model(tokens, logits_to_keep=(slots >= first - 1) & (slots < end), **images).logits
        logits[:, self._model.config.mask_token_id] = -torch.inf
        return list(logits.float().log_softmax(-1).split([1 + len(prefix) for prefix in prefixes]))

    def _score_by_masks(self, questions: Sequence[_Question]) -> list[ChoiceScores]:
        """Add the log-probabilities at masks, all choices of equally many tokens in one forward."""
        sums: list[dict[int, float]] = [{} for _ in questions]
        forwards, positions = [0] * len(questions), [0] * len(questions)
        for length in sorted({len(ids) for question in questions for ids in question.choices.token_ids}):
            members = [q for q, question in enumerate(questions) if question.find_choices(length)]
            prompt_ids, mask = pad_left([questions[q].token_ids for q in members])
            found = [questions[q].find_choices(length) for q in members]
            images = load_pixels(image for q in members for image in questions[q].images)
            for q, values in zip(members, self._predict_masked(prompt_ids, mask, length, found, images), strict=True):
                sums[q] |= values
                forwards[q] += 1
                positions[q] += prompt_ids.shape[1] + length
        ordered = [tuple(values[index] for index in sorted(values)) for values in sums]
        return [ChoiceScores(*values) for values in zip(ordered, forwards, positions, strict=True)]

    def _predict_masked(
        self,
        prompt_ids: Tensor,
        mask: Tensor | None,
        length: int,
        choices: Sequence[dict[int, tuple[int, ...]]],
        images: dict[str, Tensor],
    ) -> list[dict[int, float]]:
        """Return the sums over `length` masks after each prompt, for its choices of that many tokens by their index."""
        most = max(map(len, choices))
        tokens = [[*own.values()] for own in choices]
        candidates = torch.tensor([own + own[:1] * (most - len(own)) for own in tokens])  # [B, K, length]
        canvas = [self._model.config.mask_token_id] * length
        scores = score_masked_tokens(
            self._model,
            prompt_ids,
            canvas,
            candidates.transpose(1, 2),
            self._block_length,
            attention_mask=mask,
            **images,
        )
        sums: list[list[float]] = scores.sum(1).tolist()
        return [dict(zip(own, values, strict=False)) for own, values in zip(choices, sums, strict=True)]


def _add_up(table: Tensor, token_ids: Sequence[int]) -> float:
    """Add the log-probabilities of tokens, one of each line of table [N, vocab]."""
    return float(table.gather(1, torch.tensor(token_ids, device=table.device)[:, None]).sum())


@contextmanager
def _memory_errors(prompts: Sequence[EvaluationPrompt]) -> Iterator[None]:
    """Turn exhausted memory into a message."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"{prompts[0].place}: scoring the choices of {len(prompts)} prompts does not fit into the memory of the "
            "device: lower --batch-size"
        ) from None

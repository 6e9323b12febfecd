"""Choices get, in batches, the log-probabilities that one forward per choice and token gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.system.errors import UserError
from model.evaluate import choice_scoring
from model.evaluate.choice_scoring import AR_LIKELIHOOD, MASKED, ChoiceScorer, ChoiceScores
from model.evaluate.choices import Choices
from model.evaluate.prompts import EvaluationPrompt
from model.evaluate.statistics import summarize_choices
from model.export.load import attach_adapter
from tests.helpers.tiny_exports import make_tiny_model, save_random_adapter

MASK, BLOCK = 100, 8


def make_question(prompt: list[int], *choices: tuple[int, ...], right: int = 0) -> EvaluationPrompt:
    texts = tuple(map(str, choices))
    correct = tuple(index == right for index in range(len(choices)))
    return EvaluationPrompt(prompt, "a", str(prompt), (texts[right],), Choices(texts, choices, correct))


LETTERS = make_question([5, 120, 130], (65,), (66,), (67,), (68,), right=2)
TEXTS = make_question([7, 9], (30, 31, 32), (30, 31, 33), (40, 41, 42), (50,))
PLAIN = EvaluationPrompt([9, 8, 7, 6, 5], "a", "plain")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_tiny_model().double()


def normalize(logits: Tensor) -> Tensor:
    """Return log-probabilities over all tokens but the mask token."""
    weights = logits.exp()
    weights[MASK] = 0.0
    return (weights / weights.sum()).log()


@torch.no_grad()
def restate_likelihood(model: Any, prompt: list[int], choice: tuple[int, ...]) -> float:
    tokens, total = list(prompt), 0.0
    for token in choice:
        total += float(normalize(model(torch.tensor([tokens])).logits[0, -1])[token])
        tokens.append(token)
    return total


@torch.no_grad()
def restate_masked(model: Any, prompt: list[int], choice: tuple[int, ...]) -> float:
    length = len(prompt) + len(choice)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[len(prompt) :] = True
    tokens = torch.tensor([[*prompt, *[MASK] * len(choice)]])
    logits = model(tokens, attention_mask=visible[None, None]).logits[0, len(prompt) :]
    return sum(float(normalize(one)[token]) for one, token in zip(logits, choice, strict=True))


def test_both_ways_equal_their_definitions(model: Any) -> None:
    scores = ChoiceScorer(model, BLOCK).score([LETTERS, PLAIN, TEXTS])
    assert scores[1] == {}
    for prompt, ways in ((LETTERS, scores[0]), (TEXTS, scores[2])):
        assert prompt.choices is not None
        for way, restate in ((AR_LIKELIHOOD, restate_likelihood), (MASKED, restate_masked)):
            expected = [restate(model, prompt.token_ids, ids) for ids in prompt.choices.token_ids]
            assert ways[way].log_probabilities == pytest.approx(expected, abs=1e-4), way
            assert ways[way].chosen == expected.index(max(expected))


def test_forwards_and_positions_are_counted_as_they_run(model: Any) -> None:
    calls: list[Tensor] = []
    hook = model.encoder.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0]))
    (letters,) = ChoiceScorer(model, BLOCK).score([LETTERS])
    assert [one.shape[:2] for one in calls] == [(1, 3), (1, 4)], "letters: the prompt; the prompt and a mask"
    assert {way: (one.num_forwards, one.num_positions) for way, one in letters.items()} == {
        AR_LIKELIHOOD: (1, 3),
        MASKED: (1, 4),
    }
    calls.clear()
    both = ChoiceScorer(model, BLOCK).score([LETTERS, TEXTS])
    hook.remove()
    assert [one.shape[:2] for one in calls] == [(4, 4), (2, 4), (1, 5)], "prefixes; one mask; three masks"
    for way, batches in ((AR_LIKELIHOOD, calls[:1]), (MASKED, calls[1:])):
        assert sum(one[way].num_positions for one in both) == sum(one.shape[0] * one.shape[1] for one in batches)
    assert [one[MASKED].num_forwards for one in both] == [1, 2]


def test_no_prompts_with_choices_need_no_forward() -> None:
    class Untouchable(torch.nn.Module):
        def get_input_embeddings(self) -> Any:
            return torch.nn.Embedding(1, 1)

    assert ChoiceScorer(Untouchable(), BLOCK).score([PLAIN, PLAIN]) == [{}, {}]


def test_a_draft_adapter_changes_nothing(tmp_path: Any) -> None:
    plain, drafting = make_tiny_model(), make_tiny_model()
    attach_adapter(drafting, save_random_adapter(tmp_path / "linear_spec_lora"))
    expected = ChoiceScorer(plain, BLOCK).score([LETTERS, TEXTS])
    assert ChoiceScorer(drafting, BLOCK).score([LETTERS, TEXTS]) == expected


def test_exhausted_memory_is_one_message(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(choice_scoring, "score_masked_tokens", fail)
    with pytest.raises(UserError, match=r"scoring the choices of 1 prompts does not fit .* lower --batch-size"):
        ChoiceScorer(model, BLOCK).score([LETTERS])


def test_numbers_of_several_questions() -> None:
    letters, texts = LETTERS.choices, TEXTS.choices
    assert letters is not None and texts is not None
    wrong, right = ChoiceScores((-1.0, -2.0, -3.0, -4.0), 1, 10), ChoiceScores((-1.0, -2.0, -3.0, -4.0), 2, 30)
    numbers = summarize_choices([(letters, wrong), (texts, right)])
    assert (numbers.accuracy.num_correct, numbers.accuracy.num_scored) == (1, 2)
    assert (numbers.num_forwards, numbers.num_positions, numbers.guessing) == (3, 40, 0.25)
    low, high = numbers.accuracy.interval
    assert low < 0.5 < high

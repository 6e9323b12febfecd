"""What counts as greedy AR's output in which dtype."""

from typing import Any

import pytest
import torch

from model.evaluate.agreement import AgreementJudge
from model.evaluate.records import Agreement
from model.evaluate.statistics import find_first_difference
from tests.helpers.tiny_exports import REPEATED_TOKEN, make_repetitive_model

PROMPT = [5, 120, 130]
AR = [REPEATED_TOKEN] * 6
OTHER = [*AR[:3], 201, *AR[4:]]


def compare(model: Any, other: list[int] = OTHER) -> Agreement:
    return AgreementJudge(model).compare(PROMPT, AR, other)


def test_equal_tokens_need_no_look_at_the_model() -> None:
    model = make_repetitive_model()
    model.forward = lambda *_: pytest.fail("no forward is needed")  # pyright: ignore[reportAttributeAccessIssue]
    assert compare(model, list(AR)) is Agreement.equal
    assert compare(model.bfloat16()) is Agreement.rounded


def test_a_difference_is_a_tie_only_where_two_logits_are_equal() -> None:
    model: Any = make_repetitive_model()
    assert compare(model) is Agreement.different
    head = model.get_output_embeddings().weight
    head.data[201] = head[REPEATED_TOKEN]
    assert compare(model) is Agreement.tie
    assert compare(model.double()) is Agreement.different


def test_the_margin_of_a_tie_is_that_of_ars_two_best_logits_at_the_first_difference() -> None:
    model: Any = make_repetitive_model()
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        best = model(torch.tensor([PROMPT + AR[:3]])).logits[0, -1, REPEATED_TOKEN]
        for share, expected in ((1e-7, Agreement.tie), (1e-3, Agreement.different)):
            head[201] = head[REPEATED_TOKEN] * (1 - share)
            gap = best - model(torch.tensor([PROMPT + AR[:3]])).logits[0, -1, 201]
            assert (gap < 1e-5) == (expected is Agreement.tie)
            assert compare(model) is expected


def test_a_tie_of_two_tokens_excuses_no_third_one_and_no_end() -> None:
    model: Any = make_repetitive_model()
    head = model.get_output_embeddings().weight
    head.data[201] = head[REPEATED_TOKEN]
    assert compare(model, [*AR[:3], 202, *AR[4:]]) is Agreement.different
    assert compare(model, AR[:3]) is Agreement.different
    assert compare(model, [*AR, 201]) is Agreement.different


def test_the_mask_token_is_no_candidate_of_ar() -> None:
    model: Any = make_repetitive_model()
    head = model.get_output_embeddings().weight
    head.data[model.config.mask_token_id] = head[REPEATED_TOKEN]
    assert compare(model) is Agreement.different


def test_the_first_difference() -> None:
    assert find_first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert find_first_difference([1, 2], [1, 2, 3]) == 2

"""Responses are judged: whether they are greedy AR's, in which dtype, and whether they give an accepted answer."""

import re
from typing import Any

import pytest
import torch

from model.evaluate.judging import Agreement, AgreementJudge, extract_answer, find_first_difference, is_correct
from tests.helpers.tiny_exports import REPEATED_TOKEN, make_repetitive_model

PROMPT = [5, 120, 130]
AR = [REPEATED_TOKEN] * 6
OTHER = [*AR[:3], 201, *AR[4:]]
LAST_NUMBER = re.compile(r"(-?[0-9][0-9,.]*)")
MARKER = re.compile(r"####\s*(.+)")


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


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("  Paris \n", "Paris", True),
        ("Paris.", "Paris", True),
        ("New\n  York", "New York", True),
        ("paris", "Paris", False),
        ("It is Paris", "Paris", False),
        ("1,234.50", "1234.5", True),
        ("$42", "42", True),
        ("50%", "50.0", True),
        ("-7", "7", False),
        ("1,2", "12", False),  # a list, no thousands
        ("042", "42", True),
        ("NaN", "nan", False),
        ("1e3", "1000", True),
        ("", "0", False),
    ],
)
def test_the_whole_response_without_a_pattern(text: str, answer: str, expected: bool) -> None:
    assert is_correct(text, [answer]) is expected


def test_the_last_match_of_a_pattern_counts() -> None:
    text = "First 3 apples, then 4 more.\n#### 7.\nChecked: 3 + 4 = 7 apples, not 12."
    assert extract_answer(text, LAST_NUMBER) == "12."
    assert is_correct(text, ["12"], LAST_NUMBER)
    assert extract_answer(text, MARKER) == "7."
    assert is_correct(text, ["8", "7"], MARKER)
    assert extract_answer(text, re.compile(r"\d+")) == "12"  # without groups all of the match


def test_a_response_without_a_match_is_wrong() -> None:
    assert extract_answer("none", LAST_NUMBER) is None
    assert not is_correct("none", ["none"], LAST_NUMBER)


def test_an_optional_group_that_took_no_part_is_no_answer() -> None:
    assert not is_correct("B", ["B"], re.compile(r"(A)?B"))

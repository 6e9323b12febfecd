"""Exact match: what is compared, and what counts as equal."""

import re

import pytest

from model.evaluate.scoring import extract_answer, is_correct

LAST_NUMBER = re.compile(r"(-?[0-9][0-9,.]*)")
MARKER = re.compile(r"####\s*(.+)")


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

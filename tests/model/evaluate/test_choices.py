"""The choices of a record become tokens, or a message with file and line."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from data_pipeline.toy.tokenizer import train_tokenizer
from model.evaluate.choices import Choices, read_choices
from model.evaluate.prompts import EvaluationPrompt, check_choices
from tests.helpers.tiny_exports import TEXT, VOCAB_SIZE


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT], VOCAB_SIZE)


def test_choices_are_encoded_as_they_are_written(tokenizer: PreTrainedTokenizerFast) -> None:
    choices = read_choices({"choices": [" the sea", "<SPECIAL_100>", "B"]}, ("the sea", "x"), "here:1", tokenizer)
    assert choices is not None
    assert choices.texts == (" the sea", "<SPECIAL_100>", "B")
    assert [tokenizer.decode(list(ids)) for ids in choices.token_ids] == list(choices.texts)
    assert 100 not in choices.token_ids[1], "reserved tokens are plain characters"
    assert choices.correct == (True, False, False)
    assert choices.longest == len(choices.token_ids[1])
    assert read_choices({"answer": "A"}, ("A",), "here:1", tokenizer) is None


@pytest.mark.parametrize(
    ("choices", "answers", "message"),
    [
        ("AB", ("A",), r'here:1: "choices" must be a list of two texts or more, not \'AB\''),
        (["A"], ("A",), r'"choices" must be a list of two texts or more'),
        (["A", 2], ("A",), r'a text of "choices" must be text, not int'),
        (["A", " "], ("A",), r'a text of "choices" is empty'),
        (["A", "B", "A"], ("B",), r'"choices" holds the same text twice'),
        (["A", "B"], None, r'"answer" must name the right one of "choices"'),
        (["A", "B"], ("C",), r'"answer" must name the right one of "choices"'),
        (["A", "B"], ("A", "B"), r'"answer" must name the right one of "choices"'),
    ],
)
def test_what_is_no_question_is_named(
    tokenizer: PreTrainedTokenizerFast, choices: Any, answers: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_choices({"choices": choices}, answers, "here:1", tokenizer)


def test_choices_that_do_not_fit_are_named() -> None:
    prompt = EvaluationPrompt([1, 2, 3], "a", "here:1", ("A",), Choices(("A", "B"), ((4,), (5, 6)), (True, False)))
    check_choices([EvaluationPrompt([1] * 9, "a", "here:0"), prompt], 2, 5)
    with pytest.raises(UserError, match=r"here:1: a choice has 2 tokens, but .* a block of 1: .* raise --block-length"):
        check_choices([prompt], 1, 5)
    with pytest.raises(
        UserError, match=r"here:1: the prompt has 3 tokens; with a choice of 2 it exceeds .* 4 positions"
    ):
        check_choices([prompt], 2, 4)

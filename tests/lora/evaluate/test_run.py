"""A drafter evaluated on prompts in groups: counts of a model that repeats itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.system.errors import UserError
from lora.evaluate.run import evaluate_drafter
from model.commands.modes import LINEAR_ADAPTER
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt
from model.export.load import attach_adapter
from model.hf.layers import find_draft_adapters
from model.hf.options import AR, LINEAR
from tests.helpers.tiny_exports import REPEATED_TOKEN, make_repetitive_model, save_random_adapter

PROMPT = EvaluationPrompt([5, 120, 130], "group", "here:1")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strong enough to spoil most drafts."""
    return save_random_adapter(tmp_path_factory.mktemp("evaluate") / "adapter", std=5.0)


@pytest.fixture
def model(adapter: Path) -> Any:
    model = make_repetitive_model()
    attach_adapter(model, adapter)
    return model


def test_groups_are_evaluated_apart_and_together(model: Any) -> None:
    prompts = [PROMPT, replace(PROMPT, group="other", token_ids=[7]), replace(PROMPT, token_ids=[9, 8])]
    options = EvaluationOptions(max_new_tokens=17, resamples=20)
    evaluation = evaluate_drafter(model, prompts, options, stop_ids=())
    groups = {name: group.numbers.num_prompts for name, group in evaluation.groups.items()}
    assert list(groups.items()) == [("group", 2), ("other", 1)]
    assert [batch.prompts[0] for batch in evaluation.batches] == prompts
    assert evaluation.overall.numbers.num_prompts == 3
    assert list(evaluation.overall.modes) == [AR, LINEAR, LINEAR_ADAPTER]
    assert evaluation.overall.modes[LINEAR].acceptance_length == 8
    assert evaluation.overall.modes[LINEAR].tokens_per_forward == 17 / 5
    assert evaluation.overall.gain_percent < 0
    assert evaluation.overall.distinct_4grams == 1 / 14
    assert evaluation.differences == []
    assert evaluation.settings["block_length"] == 8
    stopped = evaluate_drafter(model, prompts, options, stop_ids=(REPEATED_TOKEN,))
    assert stopped.overall.modes[AR].new_tokens == 3


def test_the_adapter_is_still_on_when_all_is_done(model: Any) -> None:
    evaluate_drafter(model, [PROMPT], EvaluationOptions(max_new_tokens=9, resamples=2))
    assert len(find_draft_adapters(model)[1]) == 2


def test_what_cannot_be_evaluated_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="no draft adapter to evaluate"):
        evaluate_drafter(make_repetitive_model(), [PROMPT])
    with pytest.raises(UserError, match="no prompts"):
        evaluate_drafter(model, [])
    with pytest.raises(UserError, match=r"here:1: the prompt has 3 tokens; .* 256 positions"):
        evaluate_drafter(model, [PROMPT], EvaluationOptions(max_new_tokens=254))

"""One prompt in three modes: counts of a model that repeats itself, and what counts as AR's output."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.errors import UserError
from lora.evaluation import decoding
from lora.evaluation.decoding import PromptDecoder, find_first_difference
from lora.evaluation.evaluate import evaluate_drafter
from lora.evaluation.options import EvaluationOptions
from lora.evaluation.records import AR, LINEAR, LINEAR_ADAPTER, Agreement, Prompt
from model.hf.adapter_nemotron_labs_diffusion import find_draft_adapter_layers
from model.load import attach_adapter
from tests.helpers.tiny_exports import REPEATED_TOKEN, make_repetitive_model, save_random_adapter

PROMPT = Prompt([5, 120, 130], "group", "here:1")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strong enough to spoil most drafts."""
    return save_random_adapter(tmp_path_factory.mktemp("decoding") / "adapter", std=5.0)


@pytest.fixture
def model(adapter: Path) -> Any:
    model = make_repetitive_model()
    attach_adapter(model, adapter)
    return model


def build_decoder(model: Any) -> PromptDecoder:
    return PromptDecoder(model, max_new_tokens=33, block_length=8, stop_ids=())


def test_counts_of_perfect_and_of_spoilt_drafts(model: Any) -> None:
    result = build_decoder(model).decode(PROMPT)
    ar, linear, spoilt = (result.decoded[mode] for mode in (AR, LINEAR, LINEAR_ADAPTER))
    assert ar.tokens == linear.tokens == spoilt.tokens == [REPEATED_TOKEN] * 33
    assert (ar.num_forwards, ar.num_cycles) == (33, 0)
    assert (linear.num_forwards, linear.num_cycles) == (1 + 2 * 4, 4)
    assert (spoilt.num_forwards, spoilt.num_cycles) == (1 + 2 * 31 + 1, 32)  # the last token needs no draft
    assert set(result.agreements.values()) == {Agreement.equal}


def test_the_adapter_computes_drafts_alone(model: Any) -> None:
    layers = find_draft_adapter_layers(model)
    seen: list[int] = []
    layers[0].lora_A["default"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    decoder = build_decoder(model)
    with decoder._adapter.suspended():
        assert find_draft_adapter_layers(model) == []
    result = decoder.decode(PROMPT)
    assert len(layers) == len(find_draft_adapter_layers(model)) == 2
    # One call per draft of LINEAR_ADAPTER: none by AR, by LINEAR, by prefills or by verifications.
    drafted = result.decoded[LINEAR_ADAPTER]
    assert len(seen) == drafted.num_forwards - drafted.num_cycles - 1
    assert set(seen[:-8]) == {8}


def test_a_difference_is_a_tie_only_where_two_logits_are_equal(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoding.decode_linear_speculation

    def differ(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        result.output_ids[0, 10] = 201
        return result

    monkeypatch.setattr(decoding, "decode_linear_speculation", differ)
    assert build_decoder(model).decode(PROMPT).agreements[LINEAR] is Agreement.different
    head = model.get_output_embeddings().weight
    head.data[201] = head[REPEATED_TOKEN]
    assert build_decoder(model).decode(PROMPT).agreements[LINEAR] is Agreement.tie
    assert build_decoder(model.double()).decode(PROMPT).agreements[LINEAR] is Agreement.different
    assert build_decoder(model.bfloat16()).decode(PROMPT).agreements[LINEAR] is Agreement.rounded
    monkeypatch.setattr(decoding, "decode_linear_speculation", real)
    assert build_decoder(model).decode(PROMPT).agreements[LINEAR] is Agreement.equal


def test_the_first_difference() -> None:
    assert find_first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert find_first_difference([1, 2], [1, 2, 3]) == 2


def test_groups_are_evaluated_apart_and_together(model: Any) -> None:
    prompts = [PROMPT, replace(PROMPT, group="other", token_ids=[7]), replace(PROMPT, token_ids=[9, 8])]
    options = EvaluationOptions(max_new_tokens=17, resamples=20)
    evaluation = evaluate_drafter(model, prompts, options, stop_ids=())
    assert [(name, group.num_prompts) for name, group in evaluation.groups.items()] == [("group", 2), ("other", 1)]
    assert evaluation.overall.num_prompts == 3
    assert evaluation.overall.modes[LINEAR].acceptance_length == 8
    assert evaluation.overall.modes[LINEAR].tokens_per_forward == 17 / 5
    assert evaluation.overall.gain_percent < 0
    assert evaluation.overall.distinct_4grams == 1 / 14
    assert evaluation.differences == []
    assert evaluation.settings["block_length"] == 8
    stopped = evaluate_drafter(model, prompts, options, stop_ids=(REPEATED_TOKEN,))
    assert stopped.overall.modes[AR].new_tokens == 3


def test_what_cannot_be_evaluated_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="no draft adapter to evaluate"):
        evaluate_drafter(make_repetitive_model(), [PROMPT])
    with pytest.raises(UserError, match="no prompts"):
        evaluate_drafter(model, [])
    with pytest.raises(UserError, match=r"here:1: the prompt has 3 tokens; .* 256 positions"):
        evaluate_drafter(model, [PROMPT], EvaluationOptions(max_new_tokens=254))

"""evaluate_modes: which variants are decoded, what is compared and scored, and what is refused."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from data_pipeline.toy.tokenizer import train_tokenizer
from model.evaluate import decoder
from model.evaluate.evaluation import evaluate_modes
from model.evaluate.judging import Agreement, BatchJudge
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt
from model.evaluate.variants import Variant, choose_variants
from model.export.load import find_think_ids
from model.hf.options import AR, BLOCK_DIFFUSION, LINEAR, MODES, QUADRATIC
from tests.helpers.tiny_exports import REPEATED_TOKEN, TEXT, VOCAB_SIZE, make_repetitive_model

PROMPTS = [
    EvaluationPrompt([5, 120, 130], "a", "here:1"),
    EvaluationPrompt([7], "b", "here:2"),
    EvaluationPrompt([9, 8], "a", "here:3"),
]
PLAIN = [Variant(mode) for mode in MODES]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_repetitive_model()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT], VOCAB_SIZE)


def evaluate(
    model: Any, variants: list[Variant] = PLAIN, prompts: list[EvaluationPrompt] = PROMPTS, **options: Any
) -> Any:
    tokenizer = options.pop("tokenizer", None)
    values: dict[str, Any] = {"max_new_tokens": 17, "resamples": 5}
    chosen = EvaluationOptions(**(values | options))
    return evaluate_modes(model, prompts, variants, chosen, tokenizer=tokenizer, stop_ids=())


def test_variants() -> None:
    names = [variant.name for variant in choose_variants(MODES, has_adapter=True)]
    assert names == ["ar", "block_diffusion", "linear", "linear+adapter", "quadratic", "quadratic+adapter"]
    swept = choose_variants((AR, BLOCK_DIFFUSION, LINEAR), has_adapter=True, thresholds=(0.5, 1.0))
    assert [variant.name for variant in swept[4:]] == [
        *("block_diffusion@0.5", "block_diffusion@1", "linear@0", "linear@0.5", "linear@1"),
        *("linear+adapter@0", "linear+adapter@0.5", "linear+adapter@1"),
    ]
    mixed = choose_variants((LINEAR, QUADRATIC), has_adapter=True, verifier_weights=(0.5, 0.0))
    assert [variant.name for variant in mixed if variant.verifier_weight < 1] == [
        *("quadratic~0.5", "quadratic~0", "quadratic+adapter~0.5", "quadratic+adapter~0"),
    ]


def test_every_mode_of_a_model_that_repeats_itself(model: Any) -> None:
    evaluation = evaluate(model, speed_of_light=True)
    modes = evaluation.overall.modes
    assert list(modes) == list(MODES)
    assert all(numbers.agreement.equals_greedy_ar for numbers in modes.values())
    assert modes[AR].tokens_per_forward == 1
    assert modes[LINEAR].tokens_per_forward == 17 / 5
    assert modes[QUADRATIC].tokens_per_forward > modes[LINEAR].tokens_per_forward
    assert {name: group.num_prompts for name, group in evaluation.groups.items()} == {"a": 2, "b": 1}
    ceiling = evaluation.add_ceilings()
    assert (ceiling.new_tokens, ceiling.num_forwards) == (3 * 17, 3 * 5)
    assert evaluation.add_ceilings("b").new_tokens == 17
    assert evaluation.differences == []


def test_greedy_ar_is_the_reference_whether_asked_for_or_not(model: Any) -> None:
    evaluation = evaluate(model, [Variant(LINEAR)])
    assert list(evaluation.overall.modes) == [AR, LINEAR]
    assert evaluation.add_ceilings() is None


def test_samples_are_compared_with_nothing(model: Any) -> None:
    evaluation = evaluate(model, [Variant(LINEAR)], temperature=1.0, seed=0)
    assert list(evaluation.overall.modes) == [LINEAR]
    assert evaluation.overall.modes[LINEAR].agreement is None
    with pytest.raises(UserError, match="the speed of light follows greedy AR"):
        evaluate(model, temperature=1.0, speed_of_light=True)


def test_batches_stay_within_groups(model: Any) -> None:
    evaluation = evaluate(model, batch_size=2)
    assert [[prompt.place for prompt in batch.prompts] for batch in evaluation.batches] == [
        ["here:1", "here:3"],
        ["here:2"],
    ]
    assert evaluation.overall.modes[LINEAR].tokens_per_forward == 17 / 5


def test_a_sweep_gives_numbers_at_every_threshold(model: Any) -> None:
    variants = choose_variants((BLOCK_DIFFUSION,), has_adapter=False, thresholds=(0.0, 1.0))
    evaluation = evaluate(model, variants)
    assert [variant.name for variant in evaluation.plain_variants] == [AR, BLOCK_DIFFUSION]
    rates = [evaluation.overall.modes[variant.name].tokens_per_forward for variant in evaluation.swept_variants]
    assert rates[0] == 17 / 5
    assert rates[1] <= rates[0]


def test_block_diffusion_may_differ_and_speculation_may_not(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = decoder.decode

    def differ(model: Any, mode: str, *arguments: Any, **options: Any) -> Any:
        result = real(model, mode, *arguments, **options)
        if mode != AR:
            result.output_ids[:, -1] = 9
        return result

    monkeypatch.setattr(decoder, "decode", differ)
    evaluation = evaluate(model, [Variant(BLOCK_DIFFUSION), Variant(QUADRATIC)], PROMPTS[:1])
    assert evaluation.batches[0].agreements[BLOCK_DIFFUSION] == [Agreement.different]
    assert evaluation.differences == [("here:1", QUADRATIC)]
    assert evaluation.overall.modes[QUADRATIC].agreement.leading_share == 16 / 17


def test_answers_are_scored_and_texts_written_on_request(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    word = str(tokenizer.decode([REPEATED_TOKEN]))
    right, wrong = (
        EvaluationPrompt([5], "a", f"here:{i}", answers) for i, answers in enumerate([(word * 17,), ("no",)])
    )
    evaluation = evaluate(model, prompts=[right, wrong, *PROMPTS], tokenizer=tokenizer, keep_texts=True)
    for numbers in evaluation.overall.modes.values():
        assert (numbers.accuracy.num_correct, numbers.accuracy.num_scored) == (1, 2)
    assert evaluation.batches[0].texts[AR] == [word * 17]
    assert evaluation.batches[2].correct == {}
    first = evaluate(model, prompts=[right, wrong], tokenizer=tokenizer, answer_pattern=f"({word.strip() or word})")
    assert first.overall.modes[AR].accuracy.num_correct == 0


def test_thinking_is_no_part_of_an_answer(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    end = find_think_ids(tokenizer)[1]
    judge = BatchJudge(model, EvaluationOptions(), tokenizer)
    assert judge._cut_thinking([1, 2, end, 3, end, 4, 5]) == [4, 5]
    assert judge._cut_thinking([1, 2]) == [1, 2]
    with pytest.raises(UserError, match="has no <think>"):
        find_think_ids(PreTrainedTokenizerFast(tokenizer_object=_plain_tokenizer()))


def _plain_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return Tokenizer(WordLevel({"a": 0}, unk_token="a"))


def test_what_cannot_be_evaluated_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="no prompts"):
        evaluate(model, prompts=[])
    with pytest.raises(UserError, match="no draft adapter"):
        evaluate(model, [Variant(LINEAR, with_adapter=True)])
    with pytest.raises(UserError, match=r"here:1: the prompt has 3 tokens; .* 256 positions"):
        evaluate(model, max_new_tokens=254)
    masked = EvaluationPrompt([5, model.config.mask_token_id], "a", "here:9")
    with pytest.raises(UserError, match=r"here:9: the prompt contains the mask token \(id 100\)"):
        evaluate(model, prompts=[*PROMPTS, masked])

"""Prompts decoded in every mode: counts of a model that repeats itself, batches, where the adapter is on."""

from typing import Any

import pytest
import torch

from conf.system.errors import UserError
from model.evaluate.decoder import BatchDecoder, pad_left
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt
from model.evaluate.variants import Variant
from model.export.load import attach_adapter
from model.hf.options import AR, BLOCK_DIFFUSION, LINEAR, MODES, QUADRATIC
from tests.helpers.tiny_exports import REPEATED_TOKEN, make_repetitive_model, make_tiny_model, save_random_adapter

PROMPT = EvaluationPrompt([5, 120, 130], "group", "here:1")
OPTIONS = EvaluationOptions(max_new_tokens=33, block_length=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Load a model with an adapter strong enough to spoil most drafts."""
    adapter = save_random_adapter(tmp_path_factory.mktemp("decoding") / "adapter", std=5.0)
    model = make_repetitive_model()
    attach_adapter(model, adapter)
    return model


def build_decoder(model: Any, options: EvaluationOptions = OPTIONS) -> BatchDecoder:
    return BatchDecoder(model, options, stop_ids=())


def test_counts_of_perfect_and_of_spoilt_drafts(model: Any) -> None:
    decoder = build_decoder(model)
    ar, linear = (decoder.decode(Variant(mode), [PROMPT]) for mode in (AR, LINEAR))
    spoilt = decoder.decode(Variant(LINEAR, with_adapter=True), [PROMPT])
    assert ar.tokens == linear.tokens == spoilt.tokens == [[REPEATED_TOKEN] * 33]
    assert ar.forwards == {"prefill": 1, "step": 32}
    assert ar.num_positions == 3 + 32
    assert linear.forwards == {"prefill": 1, "draft": 4, "verify": 4}
    assert linear.num_positions == 3 + 4 * (8 + 8)
    assert (linear.num_proposed, linear.num_committed) == (4 * 7, 4 * 7)
    assert linear.acceptance_lengths == [8] * 4
    assert len(spoilt.acceptance_lengths) == 32
    assert spoilt.num_committed == 0
    assert spoilt.forwards["verify"] == 32


def test_every_mode_and_its_threshold(model: Any) -> None:
    decoder = build_decoder(model)
    greedy = decoder.decode(Variant(BLOCK_DIFFUSION, threshold=0.0), [PROMPT])
    assert greedy.forwards == {"prefill": 1, "denoise": 4, "commit": 4}
    assert (greedy.num_proposed, greedy.num_committed) == (4 * 7, 4 * 7)
    cautious = decoder.decode(Variant(BLOCK_DIFFUSION, threshold=1.0), [PROMPT])
    assert cautious.num_forwards >= greedy.num_forwards
    quadratic = decoder.decode(Variant(QUADRATIC), [PROMPT])
    assert sum(quadratic.acceptance_lengths) == 32
    assert quadratic.forwards["draft_and_verify"] < 4 + 4


def test_the_adapter_is_on_only_where_the_variant_says_so(model: Any) -> None:
    decoder, calls = build_decoder(model), []
    lora_a = model.encoder.layers[0].self_attn.o_proj.lora_A["default"]
    handle = lora_a.register_forward_pre_hook(lambda *_: calls.append(1))
    for mode in MODES:
        decoder.decode(Variant(mode), [PROMPT])
        assert not calls
    decoder.decode(Variant(LINEAR, with_adapter=True), [PROMPT])
    assert calls
    handle.remove()


def test_a_ragged_batch_gives_what_single_prompts_give() -> None:
    decoder = build_decoder(make_tiny_model().double(), EvaluationOptions(max_new_tokens=12, block_length=4))
    prompts = [
        EvaluationPrompt(ids, "group", f"here:{i}") for i, ids in enumerate(([5, 120, 130], [7], [200, 201, 202, 203]))
    ]
    for mode in MODES:
        batch = decoder.decode(Variant(mode), prompts)
        assert batch.tokens == [decoder.decode(Variant(mode), [prompt]).tokens[0] for prompt in prompts]


def test_a_stop_token_ends_a_row_and_is_its_last_token(model: Any) -> None:
    decoder = BatchDecoder(model, OPTIONS, stop_ids=(REPEATED_TOKEN,))
    assert decoder.decode(Variant(AR), [PROMPT, PROMPT]).tokens == [[REPEATED_TOKEN]] * 2


def test_seeds_make_samples_repeat_and_differ_from_prompt_to_prompt() -> None:
    options = EvaluationOptions(max_new_tokens=16, temperature=1.0, seed=3)
    decoder = build_decoder(make_tiny_model(), options)
    first, again, other = (decoder.decode(Variant(AR), [PROMPT], number=number).tokens for number in (0, 0, 1))
    assert first == again != other


def test_what_a_decoder_refuses_names_the_prompt_and_the_mode(model: Any) -> None:
    with pytest.raises(UserError, match=r"here:1, mode ar: .* exceed the model's 256 positions"):
        build_decoder(model, EvaluationOptions(max_new_tokens=256)).decode(Variant(AR), [PROMPT])


def test_no_memory_left_is_said(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("model.evaluate.decoder.decode", fail)
    with pytest.raises(UserError, match=r"decoding 2 prompts in mode ar does not fit .* lower --batch-size"):
        build_decoder(model).decode(Variant(AR), [PROMPT] * 2)


def test_padding_is_on_the_left_and_masked() -> None:
    ids, mask = pad_left([[1, 2, 3], [4]])
    assert ids[:, -1].tolist() == [3, 4]
    assert mask is not None
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad_left([[1], [2]])[1] is None

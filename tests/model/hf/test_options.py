"""Options that no mode can serve are refused in one sentence."""

import numpy as np
import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import MODES, DecodeOptions, resolve_stop_ids
from model.hf.sampling import make_generator

PROMPT = torch.tensor([[3, 4, 5]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 8.5}, "max_new_tokens is 8.5; it must be a whole number"),
        ({"seed": 1 << 70}, "must fit into 64 bits"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5; it must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"block_length": 0}, "block_length is 0; it must be at least 1"),
        ({"block_length": 385}, "block_length is 385; the model has no more than 384 positions"),
        ({"threshold": 1.5}, "threshold is 1.5; it is a probability between 0 and 1"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"mask_groups": 0}, "mask_groups is 0; it must be at least 1"),
        ({"mask_token_id": 64}, "mask_token_id 64 is outside the vocabulary 0..63"),
        ({"mask_token_id": -1}, "mask_token_id -1 is outside"),
        ({"thinking_budget": -1}, "thinking_budget is -1; it must be 0 or more"),
        ({"thinking_budget": 3, "think_token_ids": (12, 64)}, "think_token_ids holds 64"),
        ({"thinking_budget": 3, "think_token_ids": (12, 60)}, "think_token_ids holds 60"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens is -1; it must be 0 or more"),
        ({"max_thinking_tokens": 2.5}, "max_thinking_tokens is 2.5; it must be a whole number"),
        ({"max_thinking_tokens": 3, "end_think_token_id": 64}, "end_think_token_id holds 64"),
        ({"max_thinking_tokens": 3, "end_think_token_id": 60}, "end_think_token_id holds 60"),
        ({"thinking_budget": 3, "end_think_token_id": 13}, "end_think_token_id belongs to max_thinking_tokens"),
        ({"max_thinking_tokens": 3, "thinking_budget": 3}, "count thinking differently: give one of them"),
        ({"verifier_weight": 1.01}, "verifier_weight is 1.01; it must be from 0 to 1"),
        ({"verifier_weight": -0.1}, "verifier_weight is -0.1"),
        ({"verifier_weight": None}, "verifier_weight is None; it must be a number"),
        ({"verifier_weight": 0.5, "mask_groups": 2}, "mask_groups leaves some out: give one of the two"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"threshold": float("nan")}, "threshold is nan"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_impossible_option_is_named(tiny, change, message):
    model = tiny.model()
    for mode in MODES:
        with pytest.raises(ValueError, match=message) as error:
            decode(model, mode, PROMPT, DecodeOptions(**change))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "modes"),
    [
        ({"block_length": 4}, ("block_diffusion", "linear", "quadratic")),
        ({"threshold": 0.5}, ("block_diffusion", "linear", "quadratic")),
        ({"causal_context": False}, ("block_diffusion",)),
        ({"denoise_after_stop": False}, ("block_diffusion",)),
        ({"verifier_weight": 0.5}, ("quadratic",)),
        ({"mask_groups": 2}, ("quadratic",)),
    ],
    ids=str,
)
def test_an_option_without_effect_in_a_mode_is_refused(tiny, given, modes):
    model, (name,) = tiny.model(), given
    for mode in MODES:
        options = DecodeOptions(max_new_tokens=4, **given)
        if mode in modes:
            decode(model, mode, PROMPT, options)
            assert options.for_mode(mode) == options
            continue
        with pytest.raises(
            ValueError, match=f"{name} has no effect in mode {mode}: leave it out, or choose mode {modes[0]}"
        ):
            decode(model, mode, PROMPT, options)
        assert options.for_mode(mode) == DecodeOptions(max_new_tokens=4)


def test_options_of_sampling_are_dropped_where_decoding_is_greedy():
    options = DecodeOptions(top_k=3, top_p=0.5, seed=1)
    assert options.for_mode("linear") == DecodeOptions()
    sampled = DecodeOptions(temperature=0.5, top_k=3, top_p=0.5, seed=1)
    assert sampled.for_mode("linear") == sampled


def test_stop_ids_are_one_several_or_none(tiny):
    model = tiny.model(eos_token_id=[2, 11])
    assert resolve_stop_ids(model, None) == (2, 11)
    assert resolve_stop_ids(model, 5) == (5,)
    assert resolve_stop_ids(model, torch.tensor(5)) == (5,)
    assert resolve_stop_ids(model, [5, 6]) == (5, 6)
    assert resolve_stop_ids(model, []) == ()
    assert resolve_stop_ids(model, -1) == ()
    assert resolve_stop_ids(model, torch.tensor([-1])) == ()
    assert resolve_stop_ids(tiny.model(eos_token_id=None), None) == ()


@pytest.mark.parametrize(
    "eos", ["2", [2.7], True, 2.0, float("nan"), "abc", [None], torch.tensor([[2, 11]]), [[2]]], ids=str
)
def test_stop_ids_of_another_type_are_refused_in_one_message(tiny, eos):
    with pytest.raises(ValueError, match=r"eos_token_id is .*; it must be one or several token ids"):
        tiny.model().ar_generate(PROMPT, 4, eos_token_id=eos)


def test_numbers_of_other_libraries_are_numbers(tiny):
    model = tiny.model()
    expected, _ = model.linear_spec_generate(PROMPT, 6, 4, eos_token_id=[5])
    given = {"temperature": np.float32(0), "eos_token_id": np.array([5])}
    for six in (np.int64(6), torch.tensor(6)):
        assert torch.equal(model.linear_spec_generate(PROMPT, six, np.int32(4), **given)[0], expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_prompts_of_narrower_integers_decode_alike(tiny, dtype):
    model = tiny.model()
    for mode in MODES:
        for causal_context in (True, False) if mode == "block_diffusion" else (True,):
            options = DecodeOptions(5, eos_token_id=[], causal_context=causal_context)
            expected = decode(model, mode, PROMPT, options).output_ids
            assert decode(model, mode, PROMPT.to(dtype), options).output_ids.tolist() == expected.tolist()


@pytest.mark.parametrize("budget", [1 << 40, (1 << 63) - 1, 1 << 63, 1 << 70])
def test_a_budget_beyond_every_context_is_no_limit(tiny, budget):
    model = tiny.model()
    expected, _ = model.ar_generate(PROMPT, 6, eos_token_id=-1)
    assert torch.equal(model.ar_generate(PROMPT, 6, 0.0, -1, budget, 13)[0], expected)
    assert torch.equal(model.ar_generate(PROMPT, 6, 0.0, -1, thinking_budget=budget)[0], expected)


def test_stop_ids_of_generation_config_go_before_those_of_config(tiny):
    model = tiny.model(eos_token_id=2)
    free, _ = model.ar_generate(PROMPT, 12, eos_token_id=[])
    model.generation_config.eos_token_id = [int(free[0, 8])]
    assert resolve_stop_ids(model, None) == (int(free[0, 8]),)
    output, _ = model.ar_generate(PROMPT, 12)
    assert output[0].tolist() == free[0, : free[0].tolist().index(int(free[0, 8]), 3) + 1].tolist()


def test_a_mask_token_cannot_be_a_stop_token(tiny):
    with pytest.raises(ValueError, match="eos_token_id 60 is the mask token"):
        tiny.model().ar_generate(PROMPT, 4, eos_token_id=60)


def test_without_a_seed_the_global_generator_serves():
    assert make_generator(None, torch.device("cpu")) is None
    seeded = make_generator(7, torch.device("cpu"))
    assert seeded is not None
    assert seeded.initial_seed() == 7

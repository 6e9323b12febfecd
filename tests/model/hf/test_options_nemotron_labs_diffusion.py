"""Options that no mode can serve are refused in one sentence."""

import pytest
import torch

from model.hf.decoding_nemotron_labs_diffusion import MODES, decode
from model.hf.options_nemotron_labs_diffusion import DecodeOptions, make_generator, resolve_stop_ids

PROMPT = torch.tensor([[3, 4, 5]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": -5}, "max_new_tokens is -5; it must be at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"block_length": 0}, "block_length is 0; it must be at least 2"),
        ({"block_length": 1}, "block_length is 1; it must be at least 2"),
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


def test_stop_ids_are_one_several_or_none(tiny):
    config = tiny.config(eos_token_id=[2, 11])
    assert resolve_stop_ids(config, None) == (2, 11)
    assert resolve_stop_ids(config, 5) == (5,)
    assert resolve_stop_ids(config, [5, 6]) == (5, 6)
    assert resolve_stop_ids(config, []) == ()
    assert resolve_stop_ids(tiny.config(eos_token_id=None), None) == ()


def test_without_a_seed_the_global_generator_serves():
    assert make_generator(None, torch.device("cpu")) is None
    seeded = make_generator(7, torch.device("cpu"))
    assert seeded is not None
    assert seeded.initial_seed() == 7

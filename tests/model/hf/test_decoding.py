"""Names, the mask token and limits are treated alike in every mode."""

from typing import Any

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import MODES, DecodeOptions
from tests.model.hf.scripted_model import make_scripted_model

MASK = 60


def prompts(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def test_the_modes_are_named():
    assert MODES == ("ar", "block_diffusion", "linear", "quadratic")


def test_an_unknown_mode_is_refused_with_those_that_exist(tiny):
    with pytest.raises(ValueError, match="no mode 'linear_speculation': choose ar, block_diffusion, linear, quadratic"):
        decode(tiny.model(), "linear_speculation", prompts(1, 3), DecodeOptions())


def banned_best_model(tiny, **overrides):
    """Make a model whose mask token would win almost every argmax."""
    model = tiny.model(**overrides)
    with torch.no_grad():
        model.diffusion_head.weight[MASK] = 3 * model.diffusion_head.weight.abs().max(0).values
        model.encoder.norm.weight.abs_()
    return model


@pytest.mark.parametrize("temperature", [0.0, 5.0])
@pytest.mark.parametrize("mode", MODES)
def test_the_mask_token_is_never_emitted(tiny, mode, temperature):
    model = banned_best_model(tiny)
    assert (model(prompts(4, 30)).logits.argmax(-1) == MASK).float().mean() > 0.2
    fixed: dict[str, Any] = {"max_new_tokens": 14, "temperature": temperature, "eos_token_id": [], "seed": 0}
    extras: list[dict[str, Any]] = [{"mask_groups": 2}, {"threshold": 0.3, "top_k": 3, "top_p": 0.7}]
    for extra in extras:
        options = DecodeOptions(**(fixed | extra)).for_mode(mode)
        assert MASK not in decode(model, mode, prompts(2, 5), options).output_ids


@pytest.mark.parametrize("mode", MODES)
def test_another_mask_token_can_be_named(tiny, mode):
    model, options = tiny.model(), {"max_new_tokens": 30, "eos_token_id": []}
    result = decode(model, mode, prompts(1, 5), DecodeOptions(mask_token_id=61, **options))
    assert 61 not in result.output_ids
    text = decode(model, "ar", torch.tensor([[5, MASK, 7]]), DecodeOptions(mask_token_id=61, **options))
    assert text.output_ids.shape == (1, 33)  # the config's mask token is then text like any other


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accuracy", [0.5, 1.0])
def test_no_more_tokens_are_emitted_than_asked_for(tiny, mode, accuracy):
    model = make_scripted_model(tiny.model, accuracy)
    prompt, stop = torch.tensor([[3, 5, 4, 9], [4, 4, 8, 2], [1, 2, 3, 4]]), 7
    for max_new_tokens in (1, 2, 8, 9, 10, 18):
        for extra in ({}, {"mask_groups": 1}, {"eos_token_id": [stop]}, {"temperature": 1.0, "seed": 3}):
            given = {"max_new_tokens": max_new_tokens, "eos_token_id": [], **extra}
            options = DecodeOptions(**given).for_mode(mode)
            result = decode(model, mode, prompt, options)
            assert result.output_ids.shape[1] == 4 + max(result.num_new_tokens) <= 4 + max_new_tokens
            for sequence, num_new in zip(result.output_ids[:, 4:].tolist(), result.num_new_tokens, strict=True):
                assert num_new == max_new_tokens or (sequence[num_new - 1] == stop and options.eos_token_id)
                assert not options.eos_token_id or stop not in sequence[: num_new - 1]
            assert len(result.acceptance_lengths) == result.num_cycles
            if result.num_cycles:
                assert sum(result.acceptance_lengths) + 3 == sum(result.num_new_tokens)
            assert 0 <= result.num_committed <= result.num_proposed

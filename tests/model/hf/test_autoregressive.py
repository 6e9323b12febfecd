"""AR against a plain loop over transformers' Ministral 3 without a cache."""

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.model.hf.restated import Oracle, restate_ar

MASK = 60


def prompts(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def run(model, prompt, max_new_tokens, eos=()):
    return decode(model, "ar", prompt, DecodeOptions(max_new_tokens=max_new_tokens, eos_token_id=eos))


def restate(tiny, model, prompt, num_tokens):
    tokens = restate_ar(Oracle(tiny.reference(model), MASK), prompt[0].tolist(), num_tokens).tokens
    return torch.cat((prompt, torch.tensor([tokens])), dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_ar_equals_transformers(tiny, seed):
    model, prompt = tiny.model(seed=seed), prompts(1, 4, seed=seed)
    result = run(model, prompt, 30)
    assert torch.equal(result.output_ids, restate(tiny, model, prompt, 30))
    assert (result.num_forwards, result.tokens_per_forward) == (30, 1.0)
    assert result.forwards == {"prefill": 1, "step": 29}
    assert len(set(result.output_ids[0, 4:].tolist())) > 8


def test_ar_stops_at_the_first_stop_token(tiny):
    model, prompt = tiny.model(), prompts(1, 4)
    free = run(model, prompt, 20).output_ids
    stop = free[0, 13].item()
    first = 4 + free[0, 4:].tolist().index(stop)
    result = run(model, prompt, 20, eos=[1, stop])
    assert torch.equal(result.output_ids, free[:, : first + 1])
    assert result.num_forwards == first - 3


def test_eos_defaults_to_the_config(tiny):
    free = run(tiny.model(), prompts(1, 4), 20).output_ids
    model = tiny.model(eos_token_id=[free[0, 8].item()])
    output, num_forwards = model.ar_generate(prompts(1, 4), max_new_tokens=20)
    assert output[0, -1] == free[0, 8]
    assert num_forwards == output.shape[1] - 4 <= 5

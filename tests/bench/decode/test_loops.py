"""The loops that speed is compared with decode what ours decode, in as many forwards."""

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.bench.decode.loops import LOOPS
from tests.bench.decode.models import MASK_TOKEN_ID, Sizes, make_model, make_twin
from tests.bench.timing import time_interleaved

SIZES = Sizes(128, 24, 40, 2, 4, 2, head_dim=16, initializer_range=0.3)
BLOCK_LENGTH, THRESHOLD, NEW_TOKENS = 6, 0.5, 23
ARGUMENTS = {
    "ar": (),
    "block_diffusion": (BLOCK_LENGTH, MASK_TOKEN_ID, THRESHOLD),
    "linear": (BLOCK_LENGTH, MASK_TOKEN_ID),
    "quadratic": (BLOCK_LENGTH, MASK_TOKEN_ID),
}


def make_random_model(seed):
    return make_model(SIZES, seed, torch.float64)


def make_predictable_model(seed):
    """Build a model whose masks predict what tokens do: embeddings differ little, so positions matter more."""
    model = make_random_model(seed)
    weight = model.get_input_embeddings().weight.data
    weight.copy_(weight.mean(0) + 0.05 * weight)
    return model


@pytest.mark.parametrize("mode", LOOPS)
@pytest.mark.parametrize("make", [make_random_model, make_predictable_model])
@pytest.mark.parametrize("seed", range(3))
def test_a_plain_loop_over_transformers_gives_our_tokens_in_as_many_forwards(mode, make, seed):
    model = make(seed)
    prompt = torch.randint(0, MASK_TOKEN_ID, (1, 7))
    options = DecodeOptions(NEW_TOKENS, block_length=BLOCK_LENGTH, eos_token_id=[])
    if mode == "block_diffusion":  # a threshold means something else in speculation
        options = DecodeOptions(NEW_TOKENS, block_length=BLOCK_LENGTH, eos_token_id=[], threshold=THRESHOLD)
    ours = decode(model, mode, prompt, options.for_mode(mode))

    tokens, num_forwards = LOOPS[mode](make_twin(model, SIZES), prompt, NEW_TOKENS, *ARGUMENTS[mode])

    assert tokens == ours.output_ids[0, 7:].tolist()
    assert num_forwards == ours.num_forwards
    if make is make_predictable_model and mode in ("linear", "quadratic"):
        assert max(ours.acceptance_lengths) > 2


def test_functions_are_timed_in_turn_and_in_turn_backwards():
    calls = []

    seconds = time_interleaved([lambda: calls.append("a"), lambda: calls.append("b")], rounds=2)

    assert len(seconds) == 2
    assert all(value >= 0 for value in seconds)
    assert "".join(calls) == "baabbaab"

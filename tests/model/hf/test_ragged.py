"""A batch of prompts of different lengths decodes as each of them does alone."""

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.model.hf.adapters import attach_adapter
from tests.model.hf.modes import ALL, pad_left
from tests.model.hf.near_ties import Comparison
from tests.model.hf.scripted_model import make_scripted_model

LENGTHS = [9, 1, 4, 9, 2, 7, 5, 3]
THINK, CLOSE = 12, 13


def prompts(seed=0, low=3, high=20):
    return torch.randint(low, high, (8, 9), generator=torch.Generator().manual_seed(seed))


def assert_sequences_as_alone(model, prompt, mode, *, lengths=LENGTHS, exact=True, **options):
    """Return how many sequences part at a near tie; exact: none may."""
    ids, mask = pad_left(prompt, lengths)
    stops = options.pop("eos_token_id", [])
    settings = DecodeOptions(**{"max_new_tokens": 20, "eos_token_id": stops, **options}).for_mode(mode)
    batch, comparison = decode(model, mode, ids, settings, mask), Comparison()
    assert torch.equal(batch.output_ids[:, :9], ids)
    acceptance_lengths = []
    for index, length in enumerate(lengths):
        single = prompt[index : index + 1, 9 - length :]
        alone = decode(model, mode, single, settings)
        new_tokens = batch.output_ids[index, 9:]
        num_new = batch.num_new_tokens[index]
        acceptance_lengths += alone.acceptance_lengths
        if exact:
            assert num_new == alone.num_new_tokens[0]
            assert new_tokens[:num_new].tolist() == alone.output_ids[0, length:].tolist(), (mode, index)
        elif mode != "block_diffusion":
            comparison.add(model, single[0], alone.output_ids[0, length:], new_tokens[:num_new])
        assert all(token == stops[0] for token in new_tokens[num_new:].tolist())
    return comparison.num_ties


@pytest.mark.parametrize(("mode", "extra"), ALL, ids=str)
def test_random_models(tiny, mode, extra):
    for seed in range(2):
        assert_sequences_as_alone(tiny.model(seed=seed), prompts(seed), mode, block_length=(8, 5)[seed], **extra)


@pytest.mark.parametrize(("mode", "extra"), ALL, ids=str)
def test_sequences_that_accept_much_and_little(tiny, trained, mode, extra):
    assert_sequences_as_alone(trained.model(), trained.prompts(8, 9), mode, **extra)
    assert_sequences_as_alone(make_scripted_model(tiny.model, 0.85), prompts(), mode, **extra)


@pytest.mark.parametrize(("mode", "extra"), ALL, ids=str)
def test_sequences_that_stop_at_different_times(tiny, mode, extra):
    model = make_scripted_model(tiny.model, 0.9, seed=3)
    ids, mask = pad_left(prompts(), LENGTHS)
    options = DecodeOptions(max_new_tokens=30, eos_token_id=[4, 9], **extra)
    assert len(set(decode(model, mode, ids, options, mask).num_new_tokens)) > 4
    assert_sequences_as_alone(model, prompts(), mode, max_new_tokens=30, eos_token_id=[4, 9], **extra)


@pytest.mark.parametrize(("mode", "extra"), ALL, ids=str)
@pytest.mark.parametrize("budget", [0, 3])
def test_sequences_that_think(tiny, mode, extra, budget):
    """Some sequences begin inside <think>, some open it themselves."""
    model, prompt = make_scripted_model(tiny.model, 0.9, seed=5), prompts()
    prompt[[0, 2, 6], -1] = THINK
    assert_sequences_as_alone(model, prompt, mode, max_new_tokens=24, thinking_budget=budget, **extra)


@pytest.mark.parametrize(("mode", "extra"), ALL[3:], ids=str)
def test_sequences_with_a_draft_adapter(trained, mode, extra):
    model = trained.model()
    attach_adapter(model, std=0.1)
    assert_sequences_as_alone(model, trained.prompts(8, 9), mode, **extra)


def test_fp32_sequences_part_at_near_ties_alone(tiny, trained):
    num_ties = 0
    for mode, extra in ALL:
        model, prompt = trained.model(torch.float32), trained.prompts(8, 9)
        num_ties += assert_sequences_as_alone(model, prompt, mode, exact=False, **extra)
        num_ties += assert_sequences_as_alone(tiny.model(torch.float32), prompts(), mode, exact=False, **extra)
    print(f"fp32: {num_ties} sequences part at a near tie")
    assert num_ties < 4


@pytest.mark.parametrize("mode", ["ar", "block_diffusion", "linear", "quadratic"])
def test_padding_on_the_left_of_all_sequences_changes_nothing(tiny, mode):
    assert_sequences_as_alone(tiny.model(), prompts(), mode, lengths=[4] * 8)


@pytest.mark.parametrize("mode", ["ar", "linear", "quadratic"])
def test_a_batch_costs_the_cycles_of_its_slowest_sequence(tiny, mode):
    model = make_scripted_model(tiny.model, 0.8)
    options = DecodeOptions(max_new_tokens=30, eos_token_id=[])
    ids = prompts()
    alone = [decode(model, mode, prompt[None], options).num_forwards for prompt in ids]
    assert decode(model, mode, ids, options).num_forwards == max(alone)

"""The thinking budget: a slow loop over transformers' logits, and what every mode makes of it."""

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.model.hf.adapters import attach_adapter
from tests.model.hf.modes import SPECULATIVE
from tests.model.hf.restated import Oracle, count_thinking, make_exact, restate_ar
from tests.model.hf.scripted_model import make_scripted_model

THINK, CLOSE = 3, 4
IDS = (THINK, CLOSE)


def make(tiny, seed):
    """Make a model with few tokens, so that it opens and closes its thoughts now and then though it is random."""
    return tiny.model(seed=seed, vocab_size=12, mask_token_id=11, initializer_range=0.25)


def prompts(num_sequences, seed, size=11):
    """Draw prompts of which every other one ends in <think>."""
    ids = torch.randint(0, size, (num_sequences, 6), generator=torch.Generator().manual_seed(seed))
    ids[::2, -1] = THINK
    return ids


def options(budget, num_tokens=24, **extra):
    settings = {"max_new_tokens": num_tokens, "eos_token_id": [], "think_token_ids": IDS, "thinking_budget": budget}
    return DecodeOptions(**settings, **extra)


@pytest.mark.parametrize("budget", [None, 0, 1, 5])
def test_ar_equals_the_rule_restated(tiny, budget):
    num_forced = 0
    for seed in range(4):
        model, prompt = make(tiny, seed), prompts(2, seed)
        oracle = Oracle(make_exact(tiny.reference(model)), 11)
        for sequence in prompt:
            expected = restate_ar(oracle, sequence.tolist(), 24, budget=budget, ids=IDS).tokens
            free = restate_ar(oracle, sequence.tolist(), 24, ids=IDS).tokens
            assert decode(model, "ar", sequence[None], options(budget)).output_ids[0, 6:].tolist() == expected
            num_forced += expected != free
    assert bool(num_forced) == (budget is not None)


@pytest.mark.parametrize("budget", [0, 1, 4, 9])
@pytest.mark.parametrize(("mode", "extra"), SPECULATIVE, ids=str)
def test_speculation_equals_ar_under_the_budget(tiny, mode, extra, budget):
    models = [make(tiny, 7), make_scripted_model(tiny.model, 0.9, vocab_size=12)]
    attach_adapter(models[0])
    for model in models:
        prompt = prompts(8, budget)
        expected = decode(model, "ar", prompt, options(budget)).output_ids
        assert torch.equal(decode(model, mode, prompt, options(budget, **extra)).output_ids, expected)
        assert not torch.equal(expected, decode(model, "ar", prompt, options(None)).output_ids)


def assert_within(tokens, num_prompt, budget):
    """Assert that thoughts never exceed the budget, and that </think> comes right after it."""
    for end in range(num_prompt, len(tokens)):
        spent = count_thinking(tokens[:end], *IDS)
        if spent is not None and spent >= budget:
            assert tokens[end] == CLOSE, tokens


@pytest.mark.parametrize("budget", [0, 1, 4, 9])
@pytest.mark.parametrize("causal_context", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_block_diffusion_keeps_to_the_budget(tiny, budget, causal_context, temperature):
    for seed in range(6):
        settings = options(budget, causal_context=causal_context, temperature=temperature, seed=seed, threshold=0.3)
        settings = settings.for_mode("block_diffusion")  # no seed where decoding is greedy
        result = decode(make(tiny, seed), "block_diffusion", prompts(6, seed), settings)
        assert result.num_new_tokens == [24] * 6
        for sequence in result.output_ids.tolist():
            assert 11 not in sequence
            assert_within(sequence, 6, budget)


@pytest.mark.parametrize(("mode", "extra"), [("block_diffusion", {}), *SPECULATIVE], ids=str)
@pytest.mark.parametrize("budget", [0, 1, 6, 8, 11])
def test_what_never_stops_thinking_is_closed_once_and_at_the_budget(tiny, mode, extra, budget):
    """A model that says neither <think> nor </think> by itself."""
    accuracy = 1.0 if mode == "block_diffusion" else 0.8  # wrong drafts are such tokens
    model = make_scripted_model(tiny.model, accuracy, vocab_size=12, never=IDS)
    tokens = decode(model, mode, torch.tensor([[1, 2, THINK]]), options(budget, **extra)).output_ids[0, 3:].tolist()
    assert tokens.count(CLOSE) == 1
    assert tokens.index(CLOSE) == budget


@pytest.mark.parametrize(("mode", "extra"), [("block_diffusion", {"threshold": 0.0}), *SPECULATIVE], ids=str)
def test_thoughts_that_end_by_themselves_are_left_alone(tiny, mode, extra):
    num_closed = 0
    for seed in range(3):
        model, prompt = make(tiny, seed), prompts(2, seed)
        free = decode(model, mode, prompt, options(None, **extra)).output_ids
        longest = max(
            count_thinking(sequence[:end], *IDS) or 0
            for sequence in free.tolist()
            for end in range(6, free.shape[1] + 1)
        )
        assert torch.equal(decode(model, mode, prompt, options(longest + 1, **extra)).output_ids, free)
        num_closed += CLOSE in free[0, 6:]
    assert num_closed


def test_thinking_again_inside_a_thought_does_not_renew_the_budget(tiny):
    """<think> <think> <think> ... would else never end."""
    model = tiny.model(vocab_size=12, mask_token_id=11)
    with torch.no_grad():  # <think> wins always
        model.encoder.embed_tokens.weight += 5.0
        model.diffusion_head.weight[THINK] = 1.0
    for mode in ("ar", "linear", "quadratic", "block_diffusion"):
        tokens = decode(model, mode, torch.tensor([[1, 2]]), options(3, num_tokens=10)).output_ids[0, 2:].tolist()
        assert tokens == [THINK, THINK, THINK, THINK, CLOSE, THINK, THINK, THINK, THINK, CLOSE], mode

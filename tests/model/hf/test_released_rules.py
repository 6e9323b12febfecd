"""Block diffusion by the released models' rules: one position per step, stop tokens inside a block, their budget."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.model.hf.modes import SPECULATIVE, pad_left
from tests.model.hf.restated import CAUSAL_TOKEN, Oracle, make_exact

BLOCK, CLOSE = 6, 4


def make(tiny, seed):
    """Make a model with few tokens, so that stop tokens and </think> occur."""
    return tiny.model(seed=seed, vocab_size=12, mask_token_id=11, initializer_range=0.25)


def prompts(num_sequences, seed):
    return torch.randint(0, 11, (num_sequences, 5), generator=torch.Generator().manual_seed(seed))


def ask(oracle, tokens, block_of):
    """Ask for logits [T, vocab]; a token sees all earlier ones, and its own block both ways if it has one."""
    index, blocks = torch.arange(len(tokens)), torch.tensor(block_of)
    same = (blocks[None] == blocks[:, None]) & (blocks[None] != CAUSAL_TOKEN)
    return oracle.ask(tokens, (index[None] <= index[:, None]) | same)


def restate_released(oracle, prompt, num_tokens, *, threshold=None, stop=None, budget=None):
    """Decode one sequence by the released loop, without its faults: the mask is known by position and never chosen."""
    new_tokens = []
    while len(new_tokens) < num_tokens:
        context = prompt + new_tokens
        block = [int(oracle.ask(context)[-1].argmax()), *[oracle.mask_token_id] * (BLOCK - 1)]
        masked = [False] + [True] * (BLOCK - 1)
        if budget is not None and len(new_tokens) + BLOCK > budget and CLOSE not in new_tokens:
            place = max(0, budget - len(new_tokens))
            if place == 0 or block[0] != CLOSE:  # a seed that closes the thought is enough
                block[place], masked[place] = CLOSE, False
        while any(masked):
            logits = ask(oracle, context + block, [CAUSAL_TOKEN] * len(context) + [0] * BLOCK)[len(context) :]
            confidence, best = logits.softmax(-1).max(-1)
            order = sorted((place for place in range(BLOCK) if masked[place]), key=lambda place: -confidence[place])
            chosen = order[:1] + [
                place for place in order[1:] if threshold is not None and confidence[place] >= threshold
            ]
            for place in chosen:
                block[place], masked[place] = int(best[place]), False
            if stop in block and not any(masked[: block.index(stop)]):
                break
        new_tokens += block
        if stop in new_tokens:
            return new_tokens[: new_tokens.index(stop) + 1]
    return new_tokens


def make_options(num_tokens: int, budget: int, **extra: Any) -> DecodeOptions:
    return DecodeOptions(num_tokens, eos_token_id=-1, max_thinking_tokens=budget, end_think_token_id=CLOSE, **extra)


def run(model, prompt, **options):
    settings = {"max_new_tokens": 3 * BLOCK, "block_length": BLOCK, "eos_token_id": -1, **options}
    result = decode(model, "block_diffusion", prompt, DecodeOptions(**settings))
    return [
        sequence[prompt.shape[1] :][:count].tolist()
        for sequence, count in zip(result.output_ids, result.num_new_tokens, strict=True)
    ]


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("stop", [None, 3])
@pytest.mark.parametrize("budget", [None, 0, 2, 6, 8])
def test_tokens_are_those_of_the_released_loop(tiny, threshold, stop, budget):
    num_stopped = num_closed = 0
    for seed in range(3):
        model, prompt = make(tiny, seed), prompts(5, seed)
        oracle = Oracle(make_exact(tiny.reference(model)), 11)
        settings = {"eos_token_id": -1 if stop is None else stop, "max_thinking_tokens": budget, "threshold": threshold}
        ours = run(model, prompt, end_think_token_id=CLOSE, **settings)
        for index, sequence in enumerate(prompt.tolist()):
            expected = restate_released(oracle, sequence, 3 * BLOCK, threshold=threshold, stop=stop, budget=budget)
            assert ours[index] == expected
            num_stopped += expected[-1] == stop
            num_closed += budget is not None and expected[budget : budget + 1] == [CLOSE]
    assert bool(num_stopped) == (stop is not None)
    assert bool(num_closed) == (budget is not None)


def test_without_a_threshold_one_position_is_committed_per_step(tiny):
    result = decode(make(tiny, 0), "block_diffusion", prompts(1, 0), DecodeOptions(16, 8, eos_token_id=[]))
    assert result.forwards == {"prefill": 1, "denoise": 14, "commit": 1}


def test_positions_after_a_stop_can_be_dropped_at_once(tiny):
    model, prompt = tiny.model(vocab_size=12, mask_token_id=11, initializer_range=0.5), prompts(16, 0)
    options = DecodeOptions(16, 16, eos_token_id=3)
    full = [decode(model, "block_diffusion", sequence[None], options) for sequence in prompt]
    dropping = replace(options, denoise_after_stop=False)
    early = [decode(model, "block_diffusion", sequence[None], dropping) for sequence in prompt]
    assert all(one.num_forwards <= other.num_forwards for one, other in zip(early, full, strict=True))
    assert sum(one.num_forwards for one in early) < sum(one.num_forwards for one in full)
    assert any(one.output_ids.tolist() != other.output_ids.tolist() for one, other in zip(early, full, strict=True))


@pytest.mark.parametrize("settings", [{"max_thinking_tokens": 7}, {"denoise_after_stop": False}, {"threshold": 0.2}])
def test_a_batch_decodes_as_each_of_its_sequences_alone(tiny, settings):
    model, prompt, lengths = make(tiny, 1), prompts(5, 1), [5, 1, 3, 5, 2]
    options = DecodeOptions(20, BLOCK, eos_token_id=3, end_think_token_id=CLOSE, **settings)
    ids, mask = pad_left(prompt, lengths)
    batch = decode(model, "block_diffusion", ids, options, mask)
    for index, length in enumerate(lengths):
        alone = decode(model, "block_diffusion", prompt[index : index + 1, 5 - length :], options)
        count = batch.num_new_tokens[index]
        assert batch.output_ids[index, 5 : 5 + count].tolist() == alone.output_ids[0, length:].tolist()


@pytest.mark.parametrize("budget", [0, 3, 7])
def test_ar_forces_the_end_of_thinking_after_so_many_new_tokens(tiny, budget):
    """The prompt does not count, nor whether a thought was opened."""
    num_forced = 0
    for seed in range(4):
        model, prompt = make(tiny, seed), prompts(1, seed)
        prompt[0, -1] = CLOSE
        oracle, expected = Oracle(make_exact(tiny.reference(model)), 11), []
        while len(expected) < 14:
            is_over = len(expected) >= budget and CLOSE not in expected
            expected.append(CLOSE if is_over else int(oracle.ask(prompt[0].tolist() + expected)[-1].argmax()))
            num_forced += is_over
        assert decode(model, "ar", prompt, make_options(14, budget)).output_ids[0, 5:].tolist() == expected
    assert num_forced


@pytest.mark.parametrize(("mode", "extra"), SPECULATIVE, ids=str)
def test_speculation_equals_ar_under_the_released_budget(tiny, mode, extra):
    for seed, budget in ((0, 0), (1, 3), (2, 9)):
        model, prompt = make(tiny, seed), prompts(6, seed)
        expected = decode(model, "ar", prompt, make_options(16, budget)).output_ids
        assert torch.equal(decode(model, mode, prompt, make_options(16, budget, **extra)).output_ids, expected)


@pytest.mark.parametrize("mode", ["block_diffusion", "linear", "quadratic"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_of_one_token_decode_as_ar(tiny, mode, temperature):
    model, prompt = make(tiny, 0), prompts(3, 0)
    sampling = {"temperature": temperature, "seed": 1 if temperature else None}
    expected = decode(model, "ar", prompt, DecodeOptions(9, eos_token_id=-1, **sampling))
    result = decode(model, mode, prompt, DecodeOptions(9, 1, eos_token_id=-1, **sampling))
    assert result.num_forwards == 9
    if temperature == 0:
        assert torch.equal(result.output_ids, expected.output_ids)


def test_blocks_of_one_token_without_seeds_cost_two_forwards_each(tiny):
    options = DecodeOptions(5, 1, eos_token_id=-1, causal_context=False)
    result = decode(make(tiny, 0), "block_diffusion", prompts(1, 0), options)
    assert result.forwards == {"prefill": 1, "denoise": 5, "commit": 4}

"""Greedy speculation of every kind emits what greedy AR emits."""

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.model.hf.adapters import attach_adapter
from tests.model.hf.modes import SPECULATIVE
from tests.model.hf.near_ties import Comparison
from tests.model.hf.scripted_model import make_scripted_model

LENGTH, MASK = 9, 60
NUM_MODELS = 25  # of the long version, 40 prompts each


def prompts(num_sequences, seed):
    return torch.randint(3, 20, (num_sequences, LENGTH), generator=torch.Generator().manual_seed(seed))


def compare(model, prompt, comparison, *, num_tokens=24, block=8, modes=SPECULATIVE, eos=()):
    """Compare all modes with AR, all sequences at once."""
    options = {"max_new_tokens": num_tokens, "block_length": block, "eos_token_id": eos}
    expected = decode(model, "ar", prompt, DecodeOptions(**options).for_mode("ar"))
    for mode, extra in modes:
        result = decode(model, mode, prompt, DecodeOptions(**options, **extra))
        for index in range(len(prompt)):
            ours, theirs = (
                one.output_ids[index, LENGTH : LENGTH + one.num_new_tokens[index]] for one in (result, expected)
            )
            comparison.add(model, prompt[index], theirs, ours)


def love_masks(model):
    """Let the mask token win most argmaxes, if it is allowed to."""
    with torch.no_grad():
        model.diffusion_head.weight[MASK] = 3 * model.diffusion_head.weight.abs().max(0).values
        model.encoder.norm.weight.abs_()
    return model


def various_models(tiny, trained, dtype, num_models):
    """Yield random models of different kinds, some that love masks, some with an adapter, and a trained one."""
    for seed in range(num_models):
        kind = seed % 5
        if kind == 4:
            model = trained.model(dtype)
        else:
            model = tiny.model(dtype, seed=seed, num_hidden_layers=1 + seed % 3, initializer_range=0.2 + 0.05 * kind)
        model = love_masks(model) if kind == 1 else model
        if kind in (2, 3) or seed % 10 == 9:
            attach_adapter(model)
        yield seed, model


def compare_various(tiny, trained, dtype, num_models, num_prompts, modes=SPECULATIVE):
    comparison = Comparison()
    for seed, model in various_models(tiny, trained, dtype, num_models):
        prompt = trained.prompts(num_prompts, LENGTH, seed) if seed % 5 == 4 else prompts(num_prompts, seed)
        compare(model, prompt, comparison, block=(8, 2, 5, 16)[seed % 4], modes=modes)
    print(f"{dtype}: {comparison.num_sequences} sequences, {comparison.num_ties} part at a near tie")
    return comparison


def test_float64_output_equals_ar_exactly(tiny, trained):
    assert compare_various(tiny, trained, torch.float64, 5, 6).num_ties == 0


def test_fp32_output_equals_ar_but_for_near_ties(tiny, trained):
    assert compare_various(tiny, trained, torch.float32, 5, 6).num_ties < 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_thousand_prompts_and_models(tiny, trained, dtype):
    comparison = compare_various(tiny, trained, dtype, NUM_MODELS, 40)
    assert comparison.num_sequences == 1000 * len(SPECULATIVE)
    assert comparison.num_ties <= (0 if dtype == torch.float64 else comparison.num_sequences // 100)


@pytest.mark.slow
def test_bfloat16_agrees_mostly(tiny, trained):
    same = total = 0
    for seed, model in various_models(tiny, trained, torch.bfloat16, 10):
        options = DecodeOptions(max_new_tokens=24, eos_token_id=[])
        expected = decode(model, "ar", prompts(10, seed), options).output_ids
        for mode in ("linear", "quadratic"):
            got = decode(model, mode, prompts(10, seed), options).output_ids
            same, total = same + int((got == expected).all(1).sum()), total + 10
    print(f"bfloat16: {same} of {total} sequences are AR's from end to end")
    assert same > 0


@pytest.mark.parametrize("accuracy", [0.3, 0.7, 0.9, 0.98])
def test_drafters_of_any_quality_change_nothing(tiny, accuracy):
    """Any wrongly seen token changes what this model says; here stop tokens end sequences too."""
    for seed in range(3):
        model = make_scripted_model(tiny.model, accuracy, seed)
        compare(model, prompts(8, seed), Comparison(), num_tokens=30, block=(8, 3, 5)[seed], eos=[5])


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99])
def test_drafters_of_any_quality_change_nothing_for_a_thousand_prompts(tiny, accuracy):
    comparison = Comparison()
    for seed in range(10):
        model = make_scripted_model(tiny.model, accuracy, seed)
        compare(model, prompts(15, seed), comparison, num_tokens=40, block=(8, 2, 5, 16)[seed % 4], eos=[5])
    assert (comparison.num_sequences, comparison.num_ties) == (150 * len(SPECULATIVE), 0)


def test_the_trained_drafter_is_often_right_and_sometimes_wrong(trained):
    """Otherwise these tests would see either short acceptances alone or long ones."""
    options = DecodeOptions(max_new_tokens=24, eos_token_id=[])
    for mode in ("linear", "quadratic"):
        lengths = decode(trained.model(), mode, trained.prompts(20, LENGTH), options).acceptance_lengths
        assert {1, 2, 3, 4, 5, 6, 7, 8} <= set(lengths)

"""Quadratic self-speculation against its definition, restated slowly over transformers' Ministral 3."""

from dataclasses import replace

import pytest
import torch

from model.hf.attention_mask import make_group_layout
from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from model.hf.quadratic import decode_quadratic_speculation
from tests.model.hf.restated import Oracle, make_exact, restate_quadratic
from tests.model.hf.scripted_model import make_scripted_model

MASK = 60


def prompts(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def run(model, prompt, **options):
    return decode(model, "quadratic", prompt, DecodeOptions(**{"eos_token_id": [], **options}))


def assert_as_restated(tiny, model, prompt, num_tokens, block, **settings):
    oracle = Oracle(make_exact(tiny.reference(model)), model.config.mask_token_id)
    story = restate_quadratic(oracle, prompt[0].tolist(), num_tokens, block, **settings)
    options = {"mask_groups": settings.get("max_groups"), "threshold": settings.get("threshold")}
    result = run(model, prompt, max_new_tokens=num_tokens, block_length=block, **options)
    assert result.output_ids[0, prompt.shape[1] :].tolist() == story.tokens
    assert result.num_forwards == story.num_forwards
    assert result.acceptance_lengths == story.acceptance_lengths
    return story


@pytest.mark.parametrize("block", [2, 5, 8])
@pytest.mark.parametrize("settings", [{}, {"max_groups": 1}, {"max_groups": 2}, {"max_groups": 3}, {"threshold": 0.3}])
def test_tokens_forwards_and_acceptance_are_those_of_the_definition(tiny, trained, block, settings):
    prompt = trained.prompt(0)
    story = assert_as_restated(tiny, trained.model(torch.float64), prompt, 29, block, **settings)
    assert max(story.acceptance_lengths) > 1
    assert min(story.acceptance_lengths) < block
    wild = tiny.model(seed=block, vocab_size=8, mask_token_id=7, initializer_range=0.2)
    assert_as_restated(tiny, wild, prompt % 7, 17, block, **settings)


def test_threshold_and_groups_together(tiny, trained):
    for seed in range(3):
        model = trained.model(torch.float64)
        assert_as_restated(tiny, model, trained.prompt(seed), 21, 6, max_groups=2, threshold=0.4)


def test_every_forward_after_the_prefill_drafts_and_verifies(tiny):
    perfect = make_scripted_model(tiny.model, 1.0)
    result = run(perfect, torch.tensor([[3, 5, 4]]), max_new_tokens=25)
    assert result.forwards == {"prefill": 1, "draft_and_verify": 3}
    assert result.acceptance_lengths == [8, 8, 8]
    hopeless = make_scripted_model(tiny.model, 0.0)
    result = run(hopeless, torch.tensor([[3, 5, 4]]), max_new_tokens=5)
    assert result.forwards == {"prefill": 1, "draft_and_verify": 3, "verify": 1}  # the last token needs no draft
    assert result.acceptance_lengths == [1, 1, 1, 1]


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_quadratic_accepts_what_linear_accepts_in_half_the_forwards(tiny, accuracy):
    """With drafters whose quality does not depend on where they draft from; a last token needs no draft."""
    model, prompt, results = make_scripted_model(tiny.model, accuracy), torch.tensor([[3, 5, 4]]), {}
    for mode in ("linear", "quadratic"):
        results[mode] = decode(model, mode, prompt, DecodeOptions(max_new_tokens=57, eos_token_id=[]))
    linear, quadratic = results["linear"], results["quadratic"]
    assert quadratic.acceptance_lengths == linear.acceptance_lengths
    assert linear.num_forwards == 1 + 2 * linear.num_cycles - (accuracy == 0.0)
    assert quadratic.num_forwards == 1 + linear.num_cycles


@pytest.mark.parametrize("mask_groups", [1, 2, 3, 7, 8, 99])
def test_mask_groups_bound_the_positions_of_a_forward(tiny, mask_groups):
    model, shapes = make_scripted_model(tiny.model, 0.8), []
    real = model.encoder.forward
    model.encoder.forward = lambda hidden, *rest: shapes.append(hidden.shape[1]) or real(hidden, *rest)
    result = run(model, torch.tensor([[3, 5, 4]]), max_new_tokens=50, mask_groups=mask_groups)
    assert max(shapes[1:]) <= 8 + 8 * min(mask_groups, 8)
    assert result.num_positions == sum(shapes)
    everything = run(model, torch.tensor([[3, 5, 4]]), max_new_tokens=50)
    assert torch.equal(result.output_ids, everything.output_ids)
    assert mask_groups >= 8 or result.num_positions < everything.num_positions


def test_groups_see_what_precedes_them_and_themselves():
    """The layout of 2 drafted tokens with groups of 2 masks after the seed and the last drafted token, by hand."""
    layout = make_group_layout(2, torch.tensor([[0, 2]]), 2, is_reused=True)
    assert layout.offsets is not None and layout.visible is not None
    assert layout.offsets.tolist() == [[0, 1, 2, 1, 2, 3, 4]]
    expected = ["1000000", "1100000", "1110000", "1001100", "1001100", "1110011", "1110011"]
    assert ["".join(str(int(seen)) for seen in line) for line in layout.visible[0]] == expected


def test_a_block_is_no_longer_than_the_response_and_an_enormous_forward_is_refused(tiny):
    model, prompt = tiny.model(), torch.tensor([[3, 4, 5]])
    options = DecodeOptions(max_new_tokens=6, block_length=300, eos_token_id=[])
    assert decode_quadratic_speculation(model, prompt, options).num_positions <= 3 + 6 + 6 * 6 * 7
    with pytest.raises(ValueError, match="block_length 200 with 200 groups of masks makes forwards of 40200 positions"):
        decode_quadratic_speculation(model, prompt, replace(options, max_new_tokens=300, block_length=200))
    with pytest.raises(ValueError, match="block_length is 400; the model has no more than 384 positions"):
        decode_quadratic_speculation(model, prompt, replace(options, block_length=400))

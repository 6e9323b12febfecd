"""Choosing, filters, confidence, and the distribution of verified drafts."""

import pytest
import torch

from model.hf.sampling import Draft, Sampler, compute_confidence
from tests.model.hf.distributions import warp

GREEDY = Sampler(0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_greedy_choice_and_tiny_temperatures_agree():
    logits = torch.randn(5, 7, 30) * 100
    assert torch.equal(GREEDY.choose(logits), logits.argmax(-1))
    assert torch.equal(Sampler(1e-12).choose(logits), logits.argmax(-1))
    assert torch.equal(Sampler(2.0, top_k=1).choose(logits), logits.argmax(-1))
    assert torch.equal(Sampler(2.0, top_p=1e-9).choose(logits), logits.argmax(-1))


def test_confidence_is_the_softmax_probability():
    logits = torch.randn(4, 6, 30)
    logits[..., 3] = -torch.inf
    tokens = logits.argmax(-1)
    torch.testing.assert_close(compute_confidence(logits, tokens), logits.softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 50, 99])
@pytest.mark.parametrize("top_p", [None, 0.1, 0.5, 0.95, 1.0])
def test_filters_equal_those_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(200, 50, generator=seeded(), dtype=torch.float64) * 2
    logits[:, 7] = -torch.inf
    ours = Sampler(temperature, top_k, top_p).compute_probabilities(logits)
    torch.testing.assert_close(ours, warp(logits, temperature, top_k, top_p).softmax(-1), atol=1e-12, rtol=0)


def test_filters_apply_along_the_last_of_any_dimensions():
    logits, sampler = torch.randn(3, 4, 20, generator=seeded()), Sampler(0.7, 5, 0.8)
    flat = sampler.compute_probabilities(logits.view(12, 20))
    torch.testing.assert_close(sampler.compute_probabilities(logits).view(12, 20), flat)


def test_filtered_tokens_are_never_drawn():
    logits = torch.randn(1, 20, generator=seeded()).expand(5000, -1)
    for sampler in (Sampler(3.0, top_k=4, generator=seeded()), Sampler(3.0, top_p=0.3, generator=seeded())):
        allowed = sampler.compute_probabilities(logits[0]) > 0
        drawn = sampler.choose(logits)
        assert set(drawn.tolist()) == set(allowed.nonzero().flatten().tolist())


def test_a_seed_repeats_the_draws_and_leaves_the_global_generator_alone():
    logits, before = torch.randn(50, 9, generator=seeded()), torch.random.get_rng_state()
    draws = [Sampler(1.0, generator=seeded(seed)).choose(logits) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_greedy_verification_accepts_the_longest_equal_prefix():
    choices = torch.tensor([[4, 5, 6, 7]]).expand(4, -1)
    draft = torch.tensor([[4, 5, 6], [4, 5, 0], [0, 5, 6], [4, 0, 6]])
    verified = GREEDY.verify(Draft(draft, None), torch.nn.functional.one_hot(choices, 9).float())
    assert verified.num_accepted.tolist() == [3, 2, 0, 1]
    assert torch.equal(verified.tokens, choices)
    assert verified.bonus().flatten().tolist() == [7, 6, 4, 5]


def frequencies(tokens, vocab_size):
    return torch.bincount(tokens, minlength=vocab_size) / len(tokens)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.8)])
def test_rejection_sampling_emits_the_verifiers_distribution(top_k, top_p):
    """Over 200,000 draws every frequency is within 5 standard errors of the verifier's probability."""
    num_sequences, vocab_size = 200_000, 6
    sampler, generator = Sampler(0.8, top_k, top_p, seeded()), seeded(1)
    draft_logits = torch.randn(2, vocab_size, generator=generator)
    verify_logits = torch.randn(3, vocab_size, generator=generator)
    draft_logits[:, 2] = -torch.inf  # a token the drafter never proposes but the verifier wants
    p = sampler.compute_probabilities(verify_logits)
    draft = sampler.draft(draft_logits.expand(num_sequences, -1, -1), with_confidence=True)
    verified = sampler.verify(draft, verify_logits.expand(num_sequences, -1, -1))
    assert 0.1 < (verified.num_accepted > 0).float().mean() < 0.95
    for position in range(3):
        emitted = verified.tokens[verified.num_accepted >= position, position]
        error = (p[position] * (1 - p[position]) / len(emitted)).sqrt()
        assert ((frequencies(emitted, vocab_size) - p[position]).abs() <= 5 * error).all()


def test_confidence_of_a_draft_is_that_of_the_best_token_at_temperature_1():
    logits = torch.randn(3, 4, 20, generator=seeded())
    for sampler in (GREEDY, Sampler(2.0, top_k=3, generator=seeded())):
        confidence = sampler.draft(logits, with_confidence=True).confidence
        torch.testing.assert_close(confidence, logits.softmax(-1).amax(-1))
        assert sampler.draft(logits, with_confidence=False).confidence is None


def test_what_is_not_proposed_is_never_accepted():
    """Tokens without a probability are the mask's, which the verifier has ruled out."""
    logits = torch.randn(1000, 3, 8, generator=seeded())
    logits[..., 7] = -torch.inf
    draft = Draft(torch.full((1000, 2), 7), torch.zeros(1000, 2, 8))
    assert not Sampler(1.0, generator=seeded()).verify(draft, logits).num_accepted.any()
    assert not GREEDY.verify(Draft(draft.tokens, None), logits).num_accepted.any()


def test_a_drafter_equal_to_the_verifier_is_always_accepted():
    logits, sampler = torch.randn(50, 5, 20, dtype=torch.float64, generator=seeded()), Sampler(1.0, generator=seeded())
    draft = sampler.draft(logits[:, :4], with_confidence=False)
    assert (sampler.verify(draft, logits).num_accepted == 4).all()

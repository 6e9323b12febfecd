"""Choosing, confidence, and the distribution of verified drafts."""

import torch

from model.hf.sampling_nemotron_labs_diffusion import (
    Draft,
    choose_tokens,
    compute_confidence,
    compute_probabilities,
    draw,
    verify,
)


def test_greedy_choice_and_tiny_temperatures_agree():
    logits = torch.randn(5, 7, 30) * 100
    assert torch.equal(choose_tokens(logits, 0.0), logits.argmax(-1))
    assert torch.equal(choose_tokens(logits, 1e-12), logits.argmax(-1))


def test_confidence_is_the_softmax_probability():
    logits = torch.randn(4, 6, 30)
    logits[..., 3] = -torch.inf
    tokens = logits.argmax(-1)
    torch.testing.assert_close(compute_confidence(logits, tokens), logits.softmax(-1).amax(-1))


def test_greedy_verification_accepts_the_longest_equal_prefix():
    choices = torch.tensor([[4, 5, 6, 7]]).expand(4, -1)
    draft = torch.tensor([[4, 5, 6], [4, 5, 0], [0, 5, 6], [4, 0, 6]])
    verdict = verify(Draft(draft, None), torch.nn.functional.one_hot(choices, 9).float(), 0.0)
    assert verdict.num_accepted.tolist() == [3, 2, 0, 1]
    assert torch.equal(verdict.tokens, choices)


def frequencies(tokens, vocab_size):
    return torch.bincount(tokens, minlength=vocab_size) / len(tokens)


def test_rejection_sampling_emits_the_verifiers_distribution():
    """Over 200,000 draws every frequency is within 5 standard errors of the verifier's probability."""
    torch.manual_seed(0)
    num_rows, vocab_size, temperature = 200_000, 6, 0.8
    draft_logits, verify_logits = torch.randn(2, vocab_size), torch.randn(3, vocab_size)
    draft_logits[:, 2] = -torch.inf  # a token the drafter never proposes but the verifier wants
    q = compute_probabilities(draft_logits, temperature).expand(num_rows, -1, -1)
    p = compute_probabilities(verify_logits, temperature)
    verdict = verify(Draft(draw(q), q), verify_logits.expand(num_rows, -1, -1), temperature)
    assert 0.2 < (verdict.num_accepted > 0).float().mean() < 0.95
    for position in range(3):
        emitted = verdict.tokens[verdict.num_accepted >= position, position]
        error = (p[position] * (1 - p[position]) / len(emitted)).sqrt()
        assert ((frequencies(emitted, vocab_size) - p[position]).abs() < 5 * error).all()


def test_a_drafter_equal_to_the_verifier_is_always_accepted():
    logits = torch.randn(1, 5, 20, dtype=torch.float64)
    q = compute_probabilities(logits[:, :4], 1.0)
    for _ in range(50):
        assert verify(Draft(draw(q), q), logits, 1.0).num_accepted.item() == 4

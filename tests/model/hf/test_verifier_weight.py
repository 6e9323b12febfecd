"""Quadratic speculation verified by a mixture of AR and diffusion, against that mixture decoded token by token."""

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.model.hf.adapters import attach_adapter
from tests.model.hf.distributions import compare_total_variation, compute_p_value, count_cells
from tests.model.hf.modes import pad_left
from tests.model.hf.restated import Oracle, make_exact

BLOCK = 5


def prompts(num_sequences, seed, size=11):
    return torch.randint(0, size, (num_sequences, 5), generator=torch.Generator().manual_seed(seed))


def compute_mixture(oracle, context, block, weight):
    """Compute the probabilities [vocab] of the token after context: AR's, and those of the first of `block` masks."""
    length = len(context) + block
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[len(context) :] = True
    masks = oracle.ask(context + [oracle.mask_token_id] * block, visible)
    return weight * oracle.ask(context)[-1].softmax(-1) + (1 - weight) * masks[len(context)].softmax(-1)


def restate(oracle, prompt, num_tokens, weight):
    """Decode greedily from the mixture; the first token is AR's."""
    tokens = [int(oracle.ask(prompt)[-1].argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(compute_mixture(oracle, prompt + tokens, BLOCK, weight).argmax()))
    return tokens


def run(model, prompt, num_tokens, mask=None, **options):
    settings = DecodeOptions(num_tokens, BLOCK, eos_token_id=[], **options)
    return decode(model, "quadratic", prompt, settings, mask)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("extra", [{}, {"threshold": 0.2}], ids=str)
def test_greedy_tokens_are_those_of_the_mixture(tiny, weight, extra):
    num_others, acceptance_lengths = 0, set()
    for seed in range(4):
        model, prompt = tiny.model(seed=seed, vocab_size=12, mask_token_id=11, initializer_range=0.25), prompts(3, seed)
        oracle = Oracle(make_exact(tiny.reference(model)), 11)
        result = run(model, prompt, 14, verifier_weight=weight, **extra)
        acceptance_lengths |= set(result.acceptance_lengths)
        plain = run(model, prompt, 14).output_ids
        for index, sequence in enumerate(prompt.tolist()):
            assert result.output_ids[index, 5:].tolist() == restate(oracle, sequence, 14, weight)
        num_others += not torch.equal(result.output_ids, plain)
    assert num_others
    assert max(acceptance_lengths) > 1


def test_weight_one_is_ar(tiny):
    model, prompt = tiny.model(), prompts(3, 0)
    ar = decode(model, "ar", prompt, DecodeOptions(14, eos_token_id=[]))
    assert torch.equal(run(model, prompt, 14, verifier_weight=1.0).output_ids, ar.output_ids)
    assert torch.equal(run(model, prompt, 14, verifier_weight=1).output_ids, ar.output_ids)


def test_diffusion_alone_accepts_its_own_first_token(tiny):
    """At weight 0 the mask that stood first in the next draft verifies in the same context: drafts begin right."""
    own, ar = (run(tiny.model(), prompts(2, 1), 21, verifier_weight=weight) for weight in (0.0, 1.0))
    assert sum(own.acceptance_lengths) / own.num_cycles > sum(ar.acceptance_lengths) / ar.num_cycles


@pytest.mark.parametrize("adapter", [False, True])
def test_ragged_batches_decode_as_their_sequences_alone(tiny, adapter):
    model, prompt, lengths = tiny.model(vocab_size=12, mask_token_id=11), prompts(4, 2), [5, 1, 3, 4]
    if adapter:
        attach_adapter(model)
    ids, mask = pad_left(prompt, lengths)
    for num_tokens in (1, 2, 12):
        batch = run(model, ids, num_tokens, mask, verifier_weight=0.4)
        for index, length in enumerate(lengths):
            alone = run(model, prompt[index : index + 1, 5 - length :], num_tokens, verifier_weight=0.4)
            assert batch.output_ids[index, 5:].tolist() == alone.output_ids[0, length:].tolist()


def test_sampled_tokens_come_from_the_mixture(tiny):
    """The first of three sampled tokens is AR's, the others are the mixture's given those before."""
    size, weight, num_samples = 6, 0.5, 20_000
    model = tiny.model(torch.float32, vocab_size=7, mask_token_id=6, initializer_range=0.25, seed=1)
    oracle, prompt = Oracle(tiny.reference(model), 6), [1, 3, 0]
    exact = torch.zeros(size, size, size, dtype=torch.float64)
    first = oracle.ask(prompt)[-1].softmax(-1)
    for one in range(size):
        second = compute_mixture(oracle, [*prompt, one], 3, weight)
        for two in range(size):
            third = compute_mixture(oracle, [*prompt, one, two], 3, weight)[:size]
            exact[one, two] = (first[one] * second[two] * third).double()
    samples = [
        decode(
            model,
            "quadratic",
            torch.tensor([prompt]).expand(2500, -1),
            DecodeOptions(3, 3, eos_token_id=[], temperature=1.0, seed=seed, verifier_weight=weight),
        ).output_ids[:, 3:]
        for seed in range(num_samples // 2500)
    ]
    counts = count_cells(torch.cat(samples), size)
    assert compute_p_value(counts, exact) > 1e-3
    assert compare_total_variation(counts, exact) < 1.5

"""Sampled speculation has AR's distribution: chi-square and total variation over many decodes of one prompt."""

import pytest
import torch

from model.hf import sampling as sampling
from model.hf.decoding import decode
from model.hf.options import DecodeOptions
from tests.model.hf.adapters import attach_adapter
from tests.model.hf.distributions import compare_total_variation, compute_exact, compute_p_value, count_cells

VOCAB, MASK, NUM_TOKENS = 7, 6, 6
PROMPT = torch.tensor([[1, 3, 0]])
BATCH_SIZE, BATCHES, FEW = 2_500, 40, 6  # together 100,000; 15,000 where time is short
MODES = [
    ("ar", {}),
    ("linear", {}),
    ("linear", {"threshold": 0.25}),
    ("quadratic", {}),
    ("quadratic", {"mask_groups": 2}),
    ("quadratic", {"mask_groups": 1, "threshold": 0.2}),
]
FILTERS = [
    {"temperature": 0.9},
    {"temperature": 0.5},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 3},
    {"temperature": 1.3, "top_k": 4, "top_p": 0.9},
]


def make(tiny):
    return tiny.model(torch.float32, vocab_size=VOCAB, mask_token_id=MASK, initializer_range=0.25, seed=1)


def measure(model, mode, exact, num_batches, **options):
    """Return p-values and total variations (in multiples of chance) of the first and the next three new tokens."""
    samples, lengths = [], set()
    for seed in range(num_batches):
        settings = DecodeOptions(max_new_tokens=NUM_TOKENS, block_length=4, eos_token_id=[], seed=seed, **options)
        result = decode(model, mode, PROMPT.expand(BATCH_SIZE, -1), settings)
        samples.append(result.output_ids[:, PROMPT.shape[1] :])
        lengths |= set(result.acceptance_lengths)
    assert mode == "ar" or len(lengths) > 2  # rejections and acceptances, so that there is something to get wrong
    drawn, found = torch.cat(samples), []
    for part, others in ((slice(0, 3), (3, 4, 5)), (slice(3, 6), (0, 1, 2))):
        counts, probabilities = count_cells(drawn[:, part], MASK), exact.sum(others)
        found.append((compute_p_value(counts, probabilities), compare_total_variation(counts, probabilities)))
    print(mode, options, "p", [round(p, 4) for p, _ in found], "tv / chance", [round(tv, 3) for _, tv in found])
    return found


def assert_ar_distribution(tiny, mode, extra, filters, model=None, num_batches=BATCHES):
    model = make(tiny) if model is None else model
    exact = compute_exact(tiny.reference(make(tiny)), PROMPT, NUM_TOKENS, **filters)
    for p_value, distance in measure(model, mode, exact, num_batches, **extra, **filters):
        assert p_value > 1e-3
        assert distance < 1.5  # AR itself: up to 1.26; a biased acceptance (below): 6.5


@pytest.mark.parametrize(("mode", "extra"), [MODES[1], MODES[3], MODES[4]], ids=str)
def test_speculation_samples_from_ars_distribution(tiny, mode, extra):
    assert_ar_distribution(tiny, mode, extra, FILTERS[0], num_batches=FEW)


@pytest.mark.slow
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("mode", "extra"), MODES, ids=str)
def test_every_mode_and_filter_samples_from_ars_distribution(tiny, mode, extra, filters):
    assert_ar_distribution(tiny, mode, extra, filters)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "extra"), MODES[1:], ids=str)
def test_a_draft_adapter_leaves_the_distribution_as_it_is(tiny, mode, extra):
    model = make(tiny)
    attach_adapter(model)
    assert_ar_distribution(tiny, mode, extra, FILTERS[0], model)


@pytest.mark.parametrize("mode", ["linear", "quadratic"])
def test_a_biased_acceptance_is_found_out(tiny, monkeypatch, mode):
    """Accepting tokens a little too easily, with p / q + 25%, must fail what the right rule passes."""
    real = torch.rand
    monkeypatch.setattr(sampling.torch, "rand", lambda *shape, **options: real(*shape, **options) * 0.8)
    exact = compute_exact(tiny.reference(make(tiny)), PROMPT, NUM_TOKENS, temperature=0.9)
    found = measure(make(tiny), mode, exact, FEW, temperature=0.9)
    assert min(p_value for p_value, _ in found) < 1e-6
    assert max(distance for _, distance in found) > 1.5


@pytest.mark.parametrize("mode", ["ar", "block_diffusion", "linear", "quadratic"])
def test_seeds_repeat_a_decode_and_leave_the_global_generator_alone(tiny, mode):
    model, prompt = tiny.model(), PROMPT.expand(4, -1)

    def run(seed):
        options = DecodeOptions(max_new_tokens=20, temperature=1.0, eos_token_id=[], seed=seed)
        return decode(model, mode, prompt, options).output_ids

    before = torch.random.get_rng_state()
    first, again, other = run(1), run(1), run(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(5)
    free = run(None)
    assert not torch.equal(run(None), free)
    torch.manual_seed(5)
    assert torch.equal(run(None), free)

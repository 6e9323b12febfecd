"""Linear self-speculation emits what AR emits, in as many forwards as the drafter deserves."""

import pytest
import torch

from model.hf import speculation as speculation
from model.hf.decoding import decode
from model.hf.options import LINEAR, DecodeOptions
from model.hf.sampling import Draft
from model.hf.session import open_session
from model.hf.speculation import real_context_acceptance

MASK = 60


def prompts(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def run_ar(model, prompt, max_new_tokens, eos=()):
    return decode(model, "ar", prompt, DecodeOptions(max_new_tokens=max_new_tokens, eos_token_id=eos))


def run_linear(model, prompt, max_new_tokens, *, eos=(), **options):
    settings = {"max_new_tokens": max_new_tokens, "block_length": 8, "eos_token_id": eos, **options}
    return decode(model, "linear", prompt, DecodeOptions(**settings))


def fake_drafter(truth, share_right, seed=0):
    """Return a draft_block that knows the AR continuation and proposes its tokens with probability share_right."""
    generator = torch.Generator().manual_seed(seed)
    real = speculation.draft_block

    def draft_block(session, block_seed, length):
        draft = real(session, block_seed, length)  # counts its forward
        known = truth[:, session.model.cache.length + 1 :][:, : length - 1]
        right = torch.rand(known.shape, generator=generator) < share_right
        return Draft(torch.where(right, known, (known + 1) % 60), draft.probabilities)

    return draft_block


@pytest.mark.parametrize("seed", range(12))
def test_greedy_output_equals_ar_for_random_models(tiny, seed):
    model = tiny.model(seed=seed, num_hidden_layers=1 + seed % 3)
    prompt = prompts(1, 1 + 5 * (seed % 4), seed=seed)  # from a single token on, past the original context
    expected = run_ar(model, prompt, 40)
    for block_length in (2, 8, 32):
        result = run_linear(model, prompt, 40, block_length=block_length)
        assert torch.equal(result.output_ids, expected.output_ids)
        assert 1 + sum(result.acceptance_lengths) == 40 == result.num_new_tokens[0]


@pytest.mark.parametrize("share_right", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_output_equals_ar_for_any_drafter(tiny, monkeypatch, seed, share_right):
    model, prompt = tiny.model(seed=seed), prompts(1, 7, seed=seed)
    truth = run_ar(model, prompt, 60).output_ids
    monkeypatch.setattr(speculation, "draft_block", fake_drafter(truth, share_right, seed))
    for max_new_tokens in (1, 2, 9, 41):
        result = run_linear(model, prompt, max_new_tokens)
        assert torch.equal(result.output_ids, truth[:, : 7 + max_new_tokens])
        assert result.num_forwards == 1 + 2 * result.num_cycles - (result.num_cycles > 0 and drafts_nothing(result))


def drafts_nothing(result):
    """Return whether the last cycle had room for one token only, and so no draft."""
    return sum(result.acceptance_lengths[:-1]) + 2 == result.num_new_tokens[0]


@pytest.mark.parametrize(
    ("share_right", "max_new_tokens", "acceptance_lengths", "num_forwards"),
    [
        (1.0, 17, [8, 8], 1 + 2 * 2),
        (1.0, 18, [8, 8, 1], 1 + 2 * 2 + 1),
        (1.0, 4, [3], 1 + 2),
        (0.0, 5, [1, 1, 1, 1], 1 + 2 * 3 + 1),
        (1.0, 1, [], 1),
    ],
)
def test_forwards_of_perfect_and_hopeless_drafters(
    tiny, monkeypatch, share_right, max_new_tokens, acceptance_lengths, num_forwards
):
    model, prompt = tiny.model(), prompts(1, 7)
    monkeypatch.setattr(speculation, "draft_block", fake_drafter(run_ar(model, prompt, 40).output_ids, share_right))
    result = run_linear(model, prompt, max_new_tokens)
    assert result.acceptance_lengths == acceptance_lengths
    assert result.num_forwards == num_forwards
    assert result.tokens_per_forward == max_new_tokens / num_forwards


def test_the_model_is_called_exactly_as_often_as_counted(tiny):
    model, calls = tiny.model(), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    for generate in (model.ar_generate, model.generate, model.linear_spec_generate, model.quadratic_spec_generate):
        calls.clear()
        assert generate(prompts(1, 7), max_new_tokens=30)[1] == len(calls)


@pytest.mark.parametrize("share_right", [0.0, 0.6, 1.0])
def test_output_ends_at_an_eos_inside_a_block(tiny, monkeypatch, share_right):
    model, prompt = tiny.model(), prompts(1, 7)
    truth = run_ar(model, prompt, 60).output_ids
    monkeypatch.setattr(speculation, "draft_block", fake_drafter(truth, share_right))
    for stop in set(truth[0, 7:27].tolist()):
        expected = run_ar(model, prompt, 40, eos=[stop])
        result = run_linear(model, prompt, 40, eos=[stop])
        assert torch.equal(result.output_ids, expected.output_ids)
        assert 1 + sum(result.acceptance_lengths) == result.num_new_tokens[0]


def test_greedy_output_equals_ar_where_the_mask_token_would_win(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.diffusion_head.weight[MASK] = 3 * model.diffusion_head.weight.abs().max(0).values
    for seed in range(6):
        prompt = prompts(1, 5, seed=seed)
        assert torch.equal(run_linear(model, prompt, 40).output_ids, run_ar(model, prompt, 40).output_ids)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 1.0])
def test_a_threshold_shortens_drafts_and_never_changes_greedy_output(tiny, threshold):
    model, prompt, positions = tiny.model(), prompts(1, 7), []
    model.encoder.register_forward_hook(lambda _, arguments, output: positions.append(output.shape[1]))
    free = run_linear(model, prompt, 40)
    free_positions, positions[:] = sum(positions), []
    result = run_linear(model, prompt, 40, threshold=threshold)
    assert torch.equal(result.output_ids, free.output_ids)
    assert result.num_cycles >= free.num_cycles
    assert sum(positions) / result.num_cycles < free_positions / free.num_cycles


def test_where_a_threshold_cuts_does_not_depend_on_the_tokens_drawn(tiny):
    """Otherwise likely tokens would be preferred, and rejection sampling would not emit AR's distribution."""
    model, prompt = tiny.model(initializer_range=0.15), prompts(1, 7)

    def draft(**options):
        session = open_session(model, LINEAR, prompt, None, DecodeOptions(**options))
        with torch.no_grad():
            session.prefill()
            return speculation.draft_block(session, prompt[:, :1], 8)

    whole = draft(temperature=1.0, seed=0)
    assert whole.probabilities is not None
    confidence = whole.probabilities.amax(-1)[0]
    cut, threshold = confidence[1:].argmin().item() + 1, confidence[1:].min().item() + 1e-9
    assert confidence[0] > threshold
    for seed in range(20):
        assert draft(threshold=threshold, temperature=1.5, seed=seed).tokens.shape[1] == cut


def test_sampled_decodes_end_where_asked(tiny):
    model = tiny.model()
    for seed in range(4):
        torch.manual_seed(seed)
        for block_length in (2, 8):
            result = run_linear(model, prompts(1, 3), 19, block_length=block_length, temperature=1.0, threshold=0.2)
            assert result.output_ids.shape == (1, 22)


def test_real_context_acceptance_equals_single_decodes(tiny):
    model = tiny.model(vocab_size=8, mask_token_id=7)  # few tokens, so that some drafts are right by chance
    prefixes = torch.randint(0, 7, (40, 9), generator=torch.Generator().manual_seed(0))
    counts = real_context_acceptance(model, prefixes, block_length=6, batch_size=16)
    assert counts.shape == (40,)
    assert counts.unique().numel() > 1
    for prefix, count in zip(prefixes, counts.tolist(), strict=True):
        reference = run_ar(model, prefix[None], 6).output_ids[0, 8:]  # the seed and AR's next tokens
        block = torch.cat((reference[:1], torch.full((5,), 7)))
        index = torch.arange(14)
        mask = (index[None] <= index[:, None]) | (index[:, None] >= 8)
        with torch.no_grad():
            logits = model(torch.cat((prefix[:-1], block))[None], attention_mask=mask[None, None]).logits[0, 9:]
        logits[:, 7] = -torch.inf
        matches = (logits.argmax(-1) == reference[1:6]).long().cumprod(0).sum().item()
        assert count == matches + 1


def test_real_context_acceptance_knows_perfect_and_hopeless_drafters(tiny, monkeypatch):
    model, prefixes = tiny.model(), prompts(5, 9)
    truth = run_ar(model, prefixes, 8).output_ids
    for share_right, expected in ((1.0, 6), (0.0, 1)):
        monkeypatch.undo()
        monkeypatch.setattr(speculation, "draft_block", fake_drafter(truth, share_right))
        assert real_context_acceptance(model, prefixes, block_length=6).tolist() == [expected] * 5


def test_single_token_prefixes_need_no_cache(tiny):
    assert real_context_acceptance(tiny.model(), prompts(3, 1), block_length=4).shape == (3,)

"""AR and block diffusion against plain loops over transformers' Ministral 3 without a cache."""

import pytest
import torch

from model.hf.decoding_nemotron_labs_diffusion import decode_ar, decode_block_diffusion

MASK = 60


def prompts(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def reference_logits(reference, ids, block_of):
    """Token i sees j if j is not later, or in the same block; block_of [T] is -1 - i for causal tokens."""
    index = torch.arange(len(block_of))
    mask = (index[None] <= index[:, None]) | (block_of[None] == block_of[:, None])
    with torch.no_grad():
        logits = reference(ids, attention_mask=mask[None, None]).logits
    logits[..., MASK] = -torch.inf
    return logits


def causal(length):
    return -1 - torch.arange(length)


def reference_ar(reference, ids, max_new_tokens, stop_ids=()):
    for _ in range(max_new_tokens):
        token = reference_logits(reference, ids, causal(ids.shape[1]))[:, -1:].argmax(-1)
        ids = torch.cat((ids, token), dim=1)
        if token.item() in stop_ids:
            break
    return ids


def reference_block_diffusion(reference, ids, max_new_tokens, block_length, threshold, causal_context):
    """Batch 1, greedy, no stop token. Returns (ids, forwards a cached decoder needs)."""
    num_forwards, end = 1, ids.shape[1] + max_new_tokens
    block_of = causal(ids.shape[1]) if causal_context else torch.zeros(ids.shape[1], dtype=torch.long)
    while True:
        start, length = ids.shape[1], min(block_length, end - ids.shape[1])
        masked = torch.ones(length, dtype=torch.bool)
        block = torch.full((1, length), MASK)
        if causal_context:
            block[0, 0], masked[0] = reference_logits(reference, ids, block_of)[0, -1].argmax(), False
        while masked.any():
            drafting = torch.cat((block_of, torch.full((length,), start)))
            logits = reference_logits(reference, torch.cat((ids, block), dim=1), drafting)[0, start:]
            confidence, best = logits.softmax(-1).max(-1)
            confidence[~masked] = -1
            chosen = confidence >= threshold
            chosen[confidence.argmax()] = True
            block[0, chosen], masked[chosen] = best[chosen], False
            num_forwards += 1
        ids = torch.cat((ids, block), dim=1)
        if ids.shape[1] == end:
            return ids, num_forwards
        num_forwards += 1
        written = -1 - torch.arange(start, start + length) if causal_context else torch.full((length,), start)
        block_of = torch.cat((block_of, written))


def run_blocks(model, prompt, max_new_tokens, *, block_length=8, threshold=0.9, causal_context=True, eos=()):
    return decode_block_diffusion(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        block_length=block_length,
        threshold=threshold,
        causal_context=causal_context,
        temperature=0.0,
        eos_token_id=eos,
    )


def run_ar(model, prompt, max_new_tokens, eos=(), temperature=0.0):
    return decode_ar(model, prompt, max_new_tokens=max_new_tokens, temperature=temperature, eos_token_id=eos)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_ar_equals_transformers(tiny, seed):
    model, prompt = tiny.model(seed=seed), prompts(1, 4, seed=seed)
    result = run_ar(model, prompt, 30)
    assert torch.equal(result.output_ids, reference_ar(tiny.reference(model), prompt, 30))
    assert (result.num_forwards, result.tokens_per_forward) == (30, 1.0)
    assert len(set(result.output_ids[0, 4:].tolist())) > 8


def test_ar_stops_at_the_first_stop_token(tiny):
    model, prompt = tiny.model(), prompts(1, 4)
    free = run_ar(model, prompt, 20).output_ids
    stop = free[0, 13].item()
    first = 4 + free[0, 4:].tolist().index(stop)
    result = run_ar(model, prompt, 20, eos=[1, stop])
    assert torch.equal(result.output_ids, free[:, : first + 1])
    assert result.num_forwards == first - 3


def test_eos_defaults_to_the_config(tiny):
    free = run_ar(tiny.model(), prompts(1, 4), 20).output_ids
    model = tiny.model(eos_token_id=[free[0, 8].item()])
    output, num_forwards = model.ar_generate(prompts(1, 4), max_new_tokens=20)
    assert output[0, -1] == free[0, 8]
    assert num_forwards == output.shape[1] - 4 <= 5


def test_rows_of_a_batch_decode_as_they_would_alone(tiny):
    model, prompt = tiny.model(), prompts(5, 6)
    stop = run_ar(model, prompt[:1], 9).output_ids[0, -1].item()
    for decode in (run_ar, run_blocks):
        alone = [decode(model, row[None], 21, eos=[stop]) for row in prompt]
        batch = decode(model, prompt, 21, eos=[stop])
        assert len({result.num_new_tokens[0] for result in alone}) > 1
        assert batch.num_new_tokens == [result.num_new_tokens[0] for result in alone]
        for row, result in zip(batch.output_ids, alone, strict=True):
            length = result.output_ids.shape[1]
            assert torch.equal(row[:length], result.output_ids[0])
            assert (row[length:] == stop).all()


@pytest.mark.parametrize("causal_context", [True, False])
@pytest.mark.parametrize(("block_length", "threshold"), [(8, 0.9), (8, 0.3), (5, 0.5), (8, 0.0), (1, 0.9), (32, 1.0)])
def test_block_diffusion_equals_the_reference_and_its_count(tiny, block_length, threshold, causal_context):
    model, prompt = tiny.model(seed=block_length), prompts(1, 6)
    settings = {"block_length": block_length, "threshold": threshold, "causal_context": causal_context}
    result = run_blocks(model, prompt, 21, **settings)
    expected, num_forwards = reference_block_diffusion(tiny.reference(model), prompt, 21, **settings)
    assert torch.equal(result.output_ids, expected)
    assert result.num_forwards == num_forwards


def test_block_diffusion_counts_prefill_drafts_and_commits(tiny):
    model, prompt = tiny.model(), prompts(1, 6)
    assert run_blocks(model, prompt, 16, threshold=0.0).num_forwards == 1 + 1 + 1 + 1
    assert run_blocks(model, prompt, 16, threshold=1.0).num_forwards == 1 + 7 + 1 + 7
    assert run_blocks(model, prompt, 16, threshold=1.0, causal_context=False).num_forwards == 1 + 8 + 1 + 8
    assert run_blocks(model, prompt, 1).num_forwards == 1


def test_block_diffusion_stops_at_eos_without_filling_what_follows(tiny):
    model, prompt = tiny.model(), prompts(1, 6)
    free = run_blocks(model, prompt, 24, threshold=1.0)
    stop = free.output_ids[0, 6 + 11].item()
    result = run_blocks(model, prompt, 24, threshold=1.0, eos=[stop])
    new_tokens = result.output_ids[0, 6:].tolist()
    assert new_tokens[-1] == stop
    assert stop not in new_tokens[:-1]
    assert result.num_forwards < free.num_forwards


def test_positions_behind_a_committed_eos_are_not_denoised(tiny):
    model, prompt = tiny.model(), prompts(1, 6)
    free = run_blocks(model, prompt, 8, threshold=1.0)
    assert free.num_forwards == 8
    forwards = [run_blocks(model, prompt, 8, threshold=1.0, eos=[stop]).num_forwards for stop in free.output_ids[0, 6:]]
    assert forwards[0] == 1  # the seed itself
    assert max(forwards) <= 8
    assert len(set(forwards)) > 3


def test_finished_rows_cost_no_head_rows(tiny):
    model, candidates, rows = tiny.model(), prompts(9, 6), []
    stop = run_ar(model, candidates[:1], 1).output_ids[0, -1].item()  # the first row ends with its seed
    free = run_blocks(model, candidates, 16, threshold=1.0).output_ids[:, 6:]
    other = (free != stop).all(1).nonzero()[0].item()
    prompt = candidates[[0, other]]
    model.diffusion_head.register_forward_hook(lambda _, inputs, output: rows.append(len(output.flatten(0, -2))))
    run_blocks(model, prompt, 16, threshold=1.0, eos=[stop])
    assert rows == [2, 7, 6, 5, 4, 3, 2, 1, 2, 7, 6, 5, 4, 3, 2, 1]


def banned_best_model(tiny, **overrides):
    """The mask token would win almost every argmax."""
    model = tiny.model(**overrides)
    with torch.no_grad():
        model.diffusion_head.weight[MASK] = 3 * model.diffusion_head.weight.abs().max(0).values
        model.encoder.norm.weight.abs_()
    return model


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_the_mask_token_is_never_emitted(tiny, temperature):
    model = banned_best_model(tiny)
    assert (model(prompts(4, 30)).logits.argmax(-1) == MASK).float().mean() > 0.2
    options = {"max_new_tokens": 40, "temperature": temperature, "eos_token_id": []}
    for decode in (model.ar_generate, model.generate, model.linear_spec_generate):
        assert MASK not in decode(prompts(1, 5), **options)[0]


def test_a_mask_token_in_the_prompt_is_text_like_any_other(tiny):
    model = tiny.model()
    prompt = torch.tensor([[5, MASK, 7, MASK]])
    expected = reference_ar(tiny.reference(model), prompt, 20)
    assert torch.equal(run_ar(model, prompt, 20).output_ids, expected)
    assert torch.equal(model.linear_spec_generate(prompt, 20, eos_token_id=[])[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": torch.zeros(1, 0, dtype=torch.long)}, "prompt_ids is empty"),
        ({"prompt_ids": torch.zeros(4, dtype=torch.long)}, r"token ids \[batch, length\]"),
        ({"prompt_ids": [[1, 2]]}, r"token ids \[batch, length\]"),
        ({"prompt_ids": torch.tensor([[3, 64]])}, "holds id 64, the vocabulary is 0..63"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"block_length": 0}, "block_length is 0"),
        ({"threshold": 1.5}, "threshold is 1.5"),
    ],
)
def test_bad_arguments_are_named(tiny, change, message):
    model = tiny.model()
    methods = [model.generate, model.linear_spec_generate]
    methods += [] if change.keys() & {"block_length", "threshold"} else [model.ar_generate]
    for method in methods:
        with pytest.raises(ValueError, match=message):
            method(**{"prompt_ids": prompts(1, 3), **change})

"""Block diffusion against a plain loop over transformers' Ministral 3 without a cache."""

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import DecodeOptions

MASK = 60


def prompts(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def reference_logits(reference, ids, block_of):
    """Return logits where i sees j if j is not later or in the same block; block_of [T] is -1 - i for causal tokens."""
    index = torch.arange(len(block_of))
    mask = (index[None] <= index[:, None]) | (block_of[None] == block_of[:, None])
    with torch.no_grad():
        logits = reference(ids, attention_mask=mask[None, None]).logits
    logits[..., MASK] = -torch.inf
    return logits


def restate(reference, ids, max_new_tokens, block_length, threshold, causal_context):
    """Decode one sequence greedily without stop token; return (ids, forwards a cached decoder needs)."""
    num_forwards, end, length = 1, ids.shape[1] + max_new_tokens, ids.shape[1]
    block_of = -1 - torch.arange(length) if causal_context else torch.zeros(length, dtype=torch.long)
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


def run(model, prompt, max_new_tokens, *, eos=(), **options):
    settings = {"block_length": 8, "max_new_tokens": max_new_tokens, "eos_token_id": eos, **options}
    return decode(model, "block_diffusion", prompt, DecodeOptions(**settings))


@pytest.mark.parametrize("causal_context", [True, False])
@pytest.mark.parametrize(("block_length", "threshold"), [(8, 0.9), (8, 0.3), (5, 0.5), (8, 0.0), (2, 0.9), (32, 1.0)])
def test_block_diffusion_equals_the_reference_and_its_count(tiny, block_length, threshold, causal_context):
    model, prompt = tiny.model(seed=block_length), prompts(1, 6)
    settings = {"block_length": block_length, "threshold": threshold, "causal_context": causal_context}
    result = run(model, prompt, 21, **settings)
    expected, num_forwards = restate(tiny.reference(model), prompt, 21, **settings)
    assert torch.equal(result.output_ids, expected)
    assert result.num_forwards == num_forwards


def test_prefill_drafts_and_commits_are_counted(tiny):
    model, prompt = tiny.model(), prompts(1, 6)
    assert run(model, prompt, 16, threshold=0.0).forwards == {"prefill": 1, "denoise": 2, "commit": 1}
    assert run(model, prompt, 16, threshold=1.0).forwards == {"prefill": 1, "denoise": 14, "commit": 1}
    no_seeds = run(model, prompt, 16, threshold=1.0, causal_context=False)
    assert no_seeds.forwards == {"prefill": 1, "denoise": 16, "commit": 1}
    assert run(model, prompt, 1).forwards == {"prefill": 1}


def test_proposals_and_commits_are_counted(tiny):
    model, prompt = tiny.model(), prompts(1, 6)
    one_by_one = run(model, prompt, 8, threshold=1.0)
    assert (one_by_one.num_proposed, one_by_one.num_committed) == (7 + 6 + 5 + 4 + 3 + 2 + 1, 7)
    at_once = run(model, prompt, 16, threshold=0.0)
    assert (at_once.num_proposed, at_once.num_committed, at_once.commit_ratio) == (14, 14, 1.0)


def test_decoding_stops_at_eos_without_filling_what_follows(tiny):
    model, prompt = tiny.model(), prompts(1, 6)
    free = run(model, prompt, 24, threshold=1.0)
    stop = free.output_ids[0, 6 + 11].item()
    result = run(model, prompt, 24, threshold=1.0, eos=[stop])
    new_tokens = result.output_ids[0, 6:].tolist()
    assert new_tokens[-1] == stop
    assert stop not in new_tokens[:-1]
    assert result.num_forwards < free.num_forwards


def test_positions_after_a_committed_eos_need_not_be_denoised(tiny):
    model, prompt = tiny.model(), prompts(1, 6)
    free = run(model, prompt, 8, threshold=1.0)
    assert free.num_forwards == 8
    stops = free.output_ids[0, 6:].tolist()
    settings = {"threshold": 1.0, "denoise_after_stop": False}
    forwards = [run(model, prompt, 8, eos=[stop], **settings).num_forwards for stop in stops]
    assert forwards[0] == 1  # the seed itself
    assert max(forwards) <= 8
    assert len(set(forwards)) > 3


def test_finished_sequences_cost_no_head_positions(tiny):
    model, candidates, head_positions = tiny.model(), prompts(9, 6), []
    stop = run(model, candidates[:1], 1).output_ids[0, -1].item()  # the first sequence ends with its seed
    free = run(model, candidates, 16, threshold=1.0).output_ids[:, 6:]
    other = (free != stop).all(1).nonzero()[0].item()
    prompt = candidates[[0, other]]
    model.diffusion_head.register_forward_hook(lambda _, inputs, out: head_positions.append(len(out.flatten(0, -2))))
    run(model, prompt, 16, threshold=1.0, eos=[stop])
    assert head_positions == [2, 7, 6, 5, 4, 3, 2, 1, 2, 7, 6, 5, 4, 3, 2, 1]

"""score_masked gives, in one forward, the log-probabilities that `forward` gives under an explicit mask."""

import pytest
import torch

from model.hf import cache, decision
from tests.model.hf.adapters import attach_adapter
from tests.model.hf.modes import pad_left
from tests.model.hf.restated import Oracle, make_exact

MASK = 60
CANVASES = torch.tensor([[MASK, 9, MASK, 4], [7, MASK, MASK, 5], [MASK, MASK, 1, 2], [3, 3, MASK, MASK]])
LENGTHS = [5, 1, 9, 3]


def prompts(seed=0):
    return torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(seed))


def make_visible(num_prompt, num_canvas):
    """Build who sees whom by definition, token by token, [P + C, P + C]."""
    size = num_prompt + num_canvas
    visible = torch.zeros(size, size, dtype=torch.bool)
    for query in range(size):
        for key in range(size):
            visible[query, key] = key <= query or (query >= num_prompt and key >= num_prompt)
    return visible


@torch.no_grad()
def restate(model, prompt, canvas):
    """Return log-probabilities [M, vocab] at the masks of one canvas: forward, a dense mask, softmax by hand."""
    tokens = torch.cat((prompt, canvas))
    logits = model(tokens[None], attention_mask=make_visible(len(prompt), len(canvas))[None, None]).logits[0]
    weights = logits[len(prompt) :][canvas == MASK].exp()
    weights[:, MASK] = 0.0
    return (weights / weights.sum(-1, keepdim=True)).log()


def test_a_batch_of_prompts_of_different_lengths_equals_each_of_them_restated(tiny):
    model, candidates = tiny.model(), torch.tensor([4, 9, 33])
    ids, mask = pad_left(prompts(), LENGTHS)
    scores = model.score_masked(ids, CANVASES, candidates, attention_mask=mask)
    assert scores.shape == (4, 2, 3) and scores.dtype == torch.float64
    for index, length in enumerate(LENGTHS):
        expected = restate(model, prompts()[index, 9 - length :], CANVASES[index])[:, candidates]
        torch.testing.assert_close(scores[index], expected, rtol=1e-10, atol=1e-10)
        alone = model.score_masked(prompts()[index : index + 1, 9 - length :], CANVASES[index], candidates)
        torch.testing.assert_close(scores[index : index + 1], alone, rtol=1e-10, atol=1e-10)


def test_equally_long_prompts_need_no_mask_and_give_the_same(tiny):
    model, candidates = tiny.model(), [4, 9, 33]
    scores = model.score_masked(prompts(), CANVASES, candidates)
    expected = torch.stack([restate(model, *pair)[:, candidates] for pair in zip(prompts(), CANVASES, strict=True)])
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-10)


def test_transformers_own_ministral_gives_the_same(tiny):
    model = tiny.model()
    oracle = Oracle(make_exact(tiny.reference(model)), MASK)
    prompt, canvas = prompts()[0], CANVASES[1]
    logits = oracle.ask([*prompt.tolist(), *canvas.tolist()], make_visible(9, 4))[10:12]
    scores = model.score_masked(prompt[None], canvas, range(64 - 4))  # every token below the mask
    torch.testing.assert_close(scores[0], logits.log_softmax(-1)[:, :60], rtol=1e-10, atol=1e-10)


def test_all_tokens_but_the_mask_share_the_probability(tiny):
    model = tiny.model()
    with torch.no_grad():  # a mask token that would win everywhere
        model.diffusion_head.weight[MASK] = 0
        model.diffusion_head.weight[MASK] += 5 * model.diffusion_head.weight.abs().sum(0)
    others = [token for token in range(64) if token != MASK]
    scores = model.score_masked(prompts(), CANVASES, others)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(4, 2, dtype=torch.float64))


def test_candidates_are_the_same_or_by_sequence_or_by_mask(tiny):
    model = tiny.model()
    every = model.score_masked(prompts(), CANVASES, list(range(60)))
    by_sequence = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    by_mask = torch.stack((by_sequence, by_sequence + 20), dim=1)
    for candidates, chosen in (
        (by_sequence[0], by_sequence[0].expand(4, 2, -1)),
        (by_sequence, by_sequence[:, None].expand(4, 2, -1)),
        (by_mask.tolist(), by_mask),
    ):
        assert torch.equal(model.score_masked(prompts(), CANVASES, candidates), every.gather(-1, chosen))


def test_it_takes_one_forward(tiny):
    model, calls = tiny.model(), []
    model.encoder.register_forward_hook(lambda *_: calls.append(None))
    ids, mask = pad_left(prompts(), LENGTHS)
    model.score_masked(ids, CANVASES, [4], attention_mask=mask)
    assert len(calls) == 1


def test_a_draft_adapter_is_not_used_and_an_adapter_of_all_projections_is(tiny):
    """Nothing verifies a decision, so it is no draft."""
    expected = tiny.model().score_masked(prompts(), CANVASES, [4, 9])
    drafter = attach_adapter(tiny.model())
    assert torch.equal(drafter.score_masked(prompts(), CANVASES, [4, 9]), expected)
    tuned = attach_adapter(tiny.model(), targets=("q_proj", "v_proj"))
    assert not torch.allclose(tuned.score_masked(prompts(), CANVASES, [4, 9]), expected)


def test_half_precision_gives_fp32_and_masks_stay_where_they_are(tiny):
    scores = tiny.model(dtype=torch.bfloat16).score_masked(prompts(), CANVASES, [4, 9])
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert (scores < 0).all()


def test_fixed_shapes_of_gpus_change_nothing(tiny, monkeypatch):
    model = tiny.model()
    ids, mask = pad_left(prompts(), LENGTHS)
    expected = model.score_masked(ids, CANVASES, [4, 9], attention_mask=mask)
    monkeypatch.setattr(cache, "needs_fixed_shapes", lambda _: True)
    torch.testing.assert_close(model.score_masked(ids, CANVASES, [4, 9], attention_mask=mask), expected)


def test_a_canvas_is_no_longer_than_a_block_unless_one_is_given(tiny):
    model = tiny.model()  # blocks of 8
    assert model.score_masked(prompts(), [MASK] * 8, [4]).shape == (4, 8, 1)
    with pytest.raises(ValueError, match="canvas has 9 tokens, but within a block only 8 see each other both ways"):
        model.score_masked(prompts(), [MASK] * 9, [4])
    expected = restate(model, prompts()[0], torch.tensor([MASK] * 9))[:, [4]]
    torch.testing.assert_close(model.score_masked(prompts(), [MASK] * 9, [4], 9)[0], expected)


def test_the_last_positions_can_be_used(tiny):
    model = tiny.model(max_position_embeddings=13)
    assert model.score_masked(prompts(), CANVASES, [4]).shape == (4, 2, 1)
    with pytest.raises(ValueError, match="a prompt of 9 tokens and a canvas of 5 exceed the model's 13 positions"):
        model.score_masked(prompts(), [MASK] * 5, [4])


@pytest.mark.parametrize(
    ("canvas", "candidates", "message"),
    [
        ([1, 2], [4], "canvas 0 holds no mask token"),
        ([[MASK], [MASK], [3], [MASK]], [4], "canvas 2 holds no mask token"),
        ([[MASK, 1], [MASK, 1], [MASK, MASK], [MASK, 1]], [4], "canvases hold from 1 to 2 mask tokens"),
        ([], [4], "canvas is empty"),
        ([[MASK], [MASK, 3], [MASK], [MASK]], [4], "canvas must be token ids in a tensor, or in lists of equal length"),
        ([[MASK]] * 3, [4], r"canvas is \[3, 1\]: give \[4, length\]"),
        (MASK, [4], r"canvas is \[\]: give \[4, length\]"),
        ([MASK, 64], [4], "canvas holds id 64, the vocabulary is 0..63"),
        ([MASK], [64], "candidates holds id 64, the vocabulary is 0..63"),
        ([MASK], [3, -1], "candidates holds id -1, the vocabulary is 0..63"),
        ([MASK], [3, MASK], r"candidates holds the mask token \(id 60\), which is never predicted"),
        ([MASK], [], "candidates is empty"),
        ([MASK], [4.0], "candidates must be token ids, got torch.float32"),
        ([MASK], ["A"], "candidates must be token ids in a tensor"),
        ([MASK], 4, r"candidates is \[\]: give \[number\]"),
        ([MASK], [[4], [5]], r"candidates is \[2, 1\]: give \[number\] for all masks, \[4, number\] by sequence"),
        ([MASK, MASK], [[[4]]] * 4, r"or \[4, 2, number\] by mask"),
    ],
    ids=str,
)
def test_what_cannot_be_scored_is_named(tiny, canvas, candidates, message):
    with pytest.raises(ValueError, match=message) as error:
        decision.score_masked_tokens(tiny.model(), prompts(), canvas, candidates)
    assert "\n" not in str(error.value)


def test_a_prompt_with_the_mask_is_refused(tiny):
    with pytest.raises(ValueError, match=r"prompt_ids holds the mask token \(id 60\) in prompt 0 at index 1"):
        tiny.model().score_masked(torch.tensor([[4, MASK]]), [MASK], [4])


@pytest.mark.parametrize(
    ("block_length", "message"),
    [
        ("8", "block_length is '8'; it must be a whole number"),
        (8.5, "block_length is 8.5; it must be a whole number"),
        (True, "block_length is True; it must be a whole number"),
        (0, "block_length is 0; it must be at least 1"),
        (10**9, "the model has no more than 384 positions"),
    ],
)
def test_a_block_length_is_checked_as_in_decoding(tiny, block_length, message):
    with pytest.raises(ValueError, match=message):
        tiny.model().score_masked(torch.tensor([[3, 4]]), [60], [5], block_length)

"""Prompts are checked, and left padding becomes right padding."""

import pytest
import torch

from model.hf.decoding import decode
from model.hf.options import MODES, DecodeOptions
from model.hf.session import prepare_prompts


def prepare(model, ids, mask=None):
    mask = None if mask is None else torch.tensor(mask)
    return prepare_prompts(model, torch.tensor(ids), mask, mask_token_id=60, max_new_tokens=4)


def test_left_padding_moves_to_the_right(tiny):
    prompt = prepare(tiny.model(), [[0, 0, 5, 6], [9, 7, 8, 4], [0, 1, 2, 3]], [[0, 0, 1, 1], [1] * 4, [0, 1, 1, 1]])
    assert prompt.lengths == [2, 4, 3]
    assert prompt.tokens.tolist() == [[5, 6, 6, 6], [9, 7, 8, 4], [1, 2, 3, 3]]
    assert prompt.is_ragged


def test_padding_of_all_sequences_is_dropped(tiny):
    prompt = prepare(tiny.model(), [[0, 0, 5], [0, 7, 8]], [[0, 0, 1], [0, 1, 1]])
    assert prompt.tokens.tolist() == [[5, 5], [7, 8]]
    assert prompt.given.shape == (2, 3)
    assert not prepare(tiny.model(), [[0, 5], [0, 8]], [[0, 1], [0, 1]]).is_ragged


def test_masks_of_any_type_serve(tiny):
    model, ids = tiny.model(), torch.tensor([[0, 5, 6]])
    for dtype in (torch.bool, torch.long, torch.float32):
        mask = torch.tensor([[0, 1, 1]]).to(dtype)
        assert prepare_prompts(model, ids, mask, mask_token_id=60, max_new_tokens=1).lengths == [2]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), None, "prompt_ids is empty"),
        (torch.zeros(0, 3, dtype=torch.long), None, "prompt_ids is empty"),
        (torch.zeros(4, dtype=torch.long), None, r"token ids \[batch, length\]"),
        (torch.zeros(1, 4), None, r"token ids \[batch, length\], got torch.float32"),
        ([[1, 2]], None, r"token ids \[batch, length\]"),
        (torch.tensor([[3, 64]]), None, "holds id 64, the vocabulary is 0..63"),
        (torch.tensor([[3, -1]]), None, "holds id -1, the vocabulary is 0..63"),
        (torch.tensor([[3, 4], [5, 60]]), None, r"mask token \(id 60\) in prompt 1 at index 1"),
        (torch.tensor([[3, 4], [5, 6]]), [[1, 1], [0, 0]], "prompt 1 of prompt_ids is empty, all of it padding"),
        (torch.tensor([[3, 4], [5, 6]]), [[1, 1], [1, 0]], "prompt 1 of attention_mask.*pad on the left"),
        (torch.tensor([[3, 4, 5]]), [[1, 0, 1]], "prompt 0 of attention_mask.*pad on the left"),
        (torch.tensor([[3, 4]]), [[1, 1, 1]], r"attention_mask is \[1, 3\], prompt_ids \[1, 2\]"),
        (torch.full((1, 380), 5), None, "380 tokens and max_new_tokens 5 exceed the model's 384 positions"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_impossible_prompt_is_named(tiny, ids, mask, message):
    model, mask = tiny.model(), None if mask is None else torch.tensor(mask)
    for mode in MODES:
        with pytest.raises(ValueError, match=message) as error:
            decode(model, mode, ids, DecodeOptions(max_new_tokens=5), mask)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", MODES)
def test_padding_may_hold_any_token(tiny, mode):
    """Tokenizers pad with the eos, sometimes with ids that the model does not know."""
    model, options = tiny.model(), DecodeOptions(max_new_tokens=9, eos_token_id=[])
    expected = decode(model, mode, torch.tensor([[5, 6]]), options).output_ids
    for padding in (0, 60, 64, -100):
        got = decode(model, mode, torch.tensor([[padding, 5, 6]]), options, torch.tensor([[0, 1, 1]]))
        assert torch.equal(got.output_ids[:, 1:], expected)
        assert got.output_ids[0, 0] == padding


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_context_can_be_used(tiny, mode):
    model = tiny.model(max_position_embeddings=32)
    for max_new_tokens in (1, 9, 20):
        prompt = torch.full((1, 32 - max_new_tokens), 5)
        options = DecodeOptions(max_new_tokens=max_new_tokens, eos_token_id=[])
        assert decode(model, mode, prompt, options).output_ids.shape == (1, 32)
        mask = torch.ones(2, prompt.shape[1])
        mask[1, :7] = 0
        ragged = decode(model, mode, prompt.expand(2, -1), options, mask)
        assert ragged.output_ids.shape == (2, 32)

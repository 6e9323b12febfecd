"""Masks, whatever way they are made, say what the layout says."""

import pytest
import torch

from model.hf.attention_mask import MaskBuilder, TokenLayout, make_causal_layout, make_group_layout
from model.hf.layers import NemotronLabsDiffusionAttention

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def attention(tiny):
    return NemotronLabsDiffusionAttention(tiny.config(num_attention_heads=4, num_key_value_heads=2), 0)


def find_seen(attention, visibility, batch, num_new, num_slots):
    """Find the slots [B, N, T] bool, the same for all heads, that attention gives weight to."""
    queries, keys = torch.zeros(batch, 4, num_new, num_slots), torch.zeros(batch, 2, num_slots, num_slots)
    slots = torch.eye(num_slots).expand(batch, 2, -1, -1)
    seen = attention._attend(queries, keys, slots, visibility) > 0
    assert (seen == seen[:, :, :1]).all()
    return seen[:, :, 0]


def build(layout, lengths, capacity=32, num_visible=None):
    """Build a mask as a decode does; lengths of each sequence, or one for all."""
    builder = MaskBuilder(2, torch.float32)
    if isinstance(lengths, int):
        num_visible = lengths + layout.num_tokens if num_visible is None else num_visible
        return builder.build(layout, None, num_visible, capacity), num_visible
    num_visible = max(lengths) + layout.num_tokens if num_visible is None else num_visible
    return builder.build(layout, torch.tensor(lengths)[:, None], num_visible, capacity), num_visible


def expect(layout, lengths, num_slots):
    """Build what must be seen by definition, token by token."""
    seen = torch.zeros(len(lengths), layout.num_tokens, num_slots, dtype=torch.bool)
    for index, length in enumerate(lengths):
        seen[index, :, :length] = True
        for query in range(layout.num_tokens):
            for key in range(layout.num_tokens):
                inside = layout.visible is None or layout.visible[index % len(layout.visible), query, key]
                seen[index, query, length + key] = bool(inside)
    return seen


LAYOUTS = {
    "one token": TokenLayout(1),
    "both ways": TokenLayout(5),
    "causal": make_causal_layout(5, CPU),
    "groups": make_group_layout(2, torch.tensor([[0, 1, 2]]), 3, is_reused=True),
    "groups of their own": make_group_layout(2, torch.tensor([[0, 2], [1, 2], [0, 1]]), 2, is_reused=False),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("length", [0, 1, 7])
def test_equally_long_sequences_see_what_the_layout_says(attention, name, length):
    layout = LAYOUTS[name]
    visibility, num_slots = build(layout, length)
    seen = find_seen(attention, visibility, 3, layout.num_tokens, num_slots)
    assert torch.equal(seen, expect(layout, [length] * 3, num_slots))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("spare", [0, 6])
@pytest.mark.parametrize("lengths", [[3, 9, 1], [4, 4, 4]])
def test_sequences_of_different_length_see_what_the_layout_says(attention, name, spare, lengths):
    layout = LAYOUTS[name]
    num_slots = max(lengths) + layout.num_tokens + spare
    visibility, _ = build(layout, lengths, num_visible=num_slots)
    seen = find_seen(attention, visibility, 3, layout.num_tokens, num_slots)
    assert torch.equal(seen, expect(layout, lengths, num_slots))


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_length_for_all_sequences_with_spare_slots(attention, name):
    """This is the case of fixed shapes while sequences are equally long."""
    layout = LAYOUTS[name]
    visibility, num_slots = build(layout, [4], num_visible=30)
    seen = find_seen(attention, visibility, 3, layout.num_tokens, num_slots)
    assert torch.equal(seen, expect(layout, [4] * 3, num_slots))


def test_a_mask_is_built_once_for_all_lengths_of_the_prefix():
    builder, layout = MaskBuilder(2, torch.float32), make_causal_layout(4, CPU)

    def build_mask(num_visible, capacity):
        mask = builder.build(layout, None, num_visible, capacity).mask
        assert mask is not None
        return mask

    masks = [build_mask(length + 4, 32) for length in (3, 10, 28)]
    assert len({mask.untyped_storage().data_ptr() for mask in masks}) == 1
    assert build_mask(60, 64).shape[-1] == 60

"""Two intervals of keys per position against the rule spelled out, on random packed layouts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.batch import SequenceLayout
from data_pipeline.packing.form import SequenceForm
from model.attention.context import ContextShard
from model.attention.flex import build_mask_mod
from model.attention.visibility import (
    build_regular_layout,
    compute_dense_mask,
    count_visible_keys,
    find_visible_keys,
)
from tests.helpers.packed import pack_chats
from tests.model.attention.test_backends import PACKED, build_packed_layout

LENGTH = 96


def spell_out(layout: SequenceLayout, doubled: bool) -> Tensor:
    """Return the mask [B, R, R], bool, by the definition in named parts; padding sees nothing."""
    documents, blocks = layout.document_ids, layout.block_ids
    clean_documents = torch.where(layout.block_padding, -1, documents)  # block padding is no text: none see it
    index = torch.arange(layout.sequence_length)
    causal = index[:, None] >= index
    if not doubled:
        return causal & is_same(clean_documents, clean_documents)
    own_block = is_same(blocks, blocks) & is_same(documents, documents)
    earlier_blocks = (blocks[:, None, :] < blocks[:, :, None]) & is_same(documents, clean_documents)
    clean_to_noisy = torch.zeros_like(own_block)
    clean_to_clean = causal & is_same(clean_documents, clean_documents)
    noisy, clean = torch.cat([own_block, earlier_blocks], dim=2), torch.cat([clean_to_noisy, clean_to_clean], dim=2)
    return torch.cat([noisy, clean], dim=1)


def is_same(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries[:, :, None] == keys[:, None, :]) & (queries >= 0)[:, :, None]


def is_read(layout: SequenceLayout, doubled: bool) -> Tensor:
    """Return positions [B, R], bool, whose output is read: all but padding and, in the clean half, block padding."""
    return torch.cat([layout.document_ids >= 0, layout.is_text], dim=1) if doubled else layout.is_text


def draw_layout(seed: int) -> SequenceLayout:
    """Draw two sequences of texts and chats of one to three turns, some not full, in blocks of random size."""
    generator = np.random.default_rng(seed)
    block_size = int(generator.choice([1, 4, 8, 16]))
    alignment = int(generator.choice([1, block_size]))
    sequences = []
    for _ in range(2):
        chats: list[list[int]] = []
        while generator.random() < 0.9:
            chat = generator.integers(1, 25, generator.choice([1, 2, 4, 6])).tolist()
            taken = sum(-(-length // alignment) * alignment for one in [*chats, chat] for length in one)
            if taken > LENGTH:
                break
            chats.append(chat)
        sequences.append(chats or [[int(generator.integers(1, LENGTH))]])
    form = SequenceForm(LENGTH, block_size, alignment, isolate_documents=bool(generator.random() < 0.8))
    return pack_chats(sequences, form).layout


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
def test_intervals_are_the_definition_on_hundreds_of_packed_layouts(doubled: bool) -> None:
    with_gaps = 0
    for seed in range(300):
        layout = draw_layout(seed)
        read, expected = is_read(layout, doubled), spell_out(layout, doubled)
        mask = compute_dense_mask(layout, doubled)
        assert torch.equal(mask[read], expected[read]), f"layout {seed}"
        assert mask.any(dim=2).all(), "a softmax needs a key, in padding too"
        assert torch.equal(count_visible_keys(layout, doubled), expected.sum(dim=2) * read)
        with_gaps += find_visible_keys(layout, doubled).gaps is not None
    assert 50 < with_gaps < 290, "both kinds of layouts were drawn"


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
def test_flex_attentions_mask_mod_reads_the_same_intervals(doubled: bool) -> None:
    for seed in range(40):
        keys = find_visible_keys(layout := draw_layout(seed), doubled)
        batch, queries, index = (torch.arange(size) for size in (2, *[LENGTH * (2 if doubled else 1)] * 2))
        sees = build_mask_mod(keys)
        found = sees(batch[:, None, None], torch.tensor(0), queries[:, None], index)
        assert torch.equal(found, compute_dense_mask(layout, doubled))


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
def test_a_shards_intervals_are_its_part_of_the_dense_mask(doubled: bool) -> None:
    """Its noisy keys are its own, in order; clean ones are the whole sequence's."""
    for seed in range(40):
        layout = draw_layout(seed)
        chunk = LENGTH // 4
        if doubled and any(
            (layout.block_ids[:, edge] == layout.block_ids[:, edge - 1]).any() for edge in range(chunk, LENGTH, chunk)
        ):
            continue
        mask = compute_dense_mask(layout, doubled)
        for rank in range(2):
            shard = ContextShard(rank, 2)
            positions = shard.find_positions(LENGTH, doubled)
            local = find_visible_keys(layout, doubled).take(shard.find_whole(LENGTH, doubled))
            own = positions[: local.num_noisy]
            clean = torch.arange(LENGTH) + (LENGTH if doubled else 0)
            assert torch.equal(local.mask_noisy(slice(None), range(local.num_noisy)), mask[:, positions][:, :, own])
            assert torch.equal(local.mask_clean(slice(None), range(LENGTH)), mask[:, positions][:, :, clean])


def test_the_dense_mask_is_the_definition() -> None:
    mask = compute_dense_mask(build_regular_layout(4, 2), doubled=True)[0]
    noisy = [[1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]]
    clean = [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert mask.int().tolist() == noisy + clean


def test_block_padding_is_seen_by_its_noisy_block_alone() -> None:
    layout = build_packed_layout([[[3, 20, 5, 20]]])
    mask = compute_dense_mask(layout, doubled=True)[0]
    block_padding = torch.cat([layout.block_padding, layout.block_padding], dim=1)[0].nonzero().flatten()
    noisy, clean = block_padding[block_padding < 160], block_padding[block_padding >= 160]
    assert len(noisy) == len(clean) == 24
    text = layout.is_text[0].nonzero().flatten()
    assert not mask[text + 160][:, block_padding].any(), "no clean text sees block padding"
    assert not mask[text][:, clean].any(), "no noisy text sees clean block padding"
    for position in text.tolist():
        same_block = layout.block_ids[0][noisy] == layout.block_ids[0, position]
        assert torch.equal(mask[position, noisy], same_block)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize("sequences", PACKED)
def test_visible_keys_are_the_sums_of_the_definition(sequences: list[list[list[int]]], doubled: bool) -> None:
    layout = build_packed_layout(sequences)
    counted = spell_out(layout, doubled).sum(dim=2) * is_read(layout, doubled)
    assert torch.equal(count_visible_keys(layout, doubled), counted)

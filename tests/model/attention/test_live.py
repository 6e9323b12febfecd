"""Live noisy blocks: dealt evenly, in few lengths, each seeing what it sees in the whole forward."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from conf.composition.compose import compose_size
from data_pipeline.batch import SequenceLayout
from model.attention.context import ContextShard
from model.attention.flex import build_flex_attention
from model.attention.grouped import build_grouped_attention
from model.attention.live import choose_positions, deal_blocks
from model.attention.positions import ForwardPositions
from model.attention.visibility import build_regular_layout, compute_dense_mask, find_visible_keys
from tests.model.attention.test_backends import random_heads
from tests.model.attention.test_visibility import LENGTH, draw_layout

LENGTHS = (24, 48, 72, 96)
BLOCKS_OF_2 = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])


def draw_live(layout: SequenceLayout, seed: int) -> Tensor:
    """Draw which blocks are live: few of them in some layouts, most in others."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(1, generator=generator)
    return (torch.rand(layout.block_ids.shape, generator=generator) < share).gather(1, layout.block_ids)


def shards_of(size: int) -> list[ContextShard]:
    return [ContextShard(rank, size) for rank in range(size)]


def choose_all(layout: SequenceLayout, is_live: Tensor, size: int) -> list[ForwardPositions]:
    """Return the positions of every rank, not all of them live."""
    lengths = (*(length // size for length in LENGTHS[:-1]), LENGTH // size)
    return [choose_positions(layout.block_ids, is_live, shard, lengths) for shard in shards_of(size)]


def test_the_picture_in_the_module() -> None:
    is_live = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    assert deal_blocks(BLOCKS_OF_2, is_live, 2).tolist() == [[0, 0, -1, -1, 1, 1, 1, 1]]
    places = [(ContextShard(), 6), (ContextShard(0, 2), 4), (ContextShard(1, 2), 4)]
    one, first, second = (choose_positions(BLOCKS_OF_2, is_live, shard, (length, 8)) for shard, length in places)
    assert one.noisy.tolist() == [[0, 1, 4, 5, 6, 7]]
    assert one.clean.tolist() == list(range(8))
    assert (first.noisy.tolist(), second.noisy.tolist()) == ([[0, 1, -1, -1]], [[4, 5, 6, 7]])
    assert (first.clean.tolist(), second.clean.tolist()) == ([0, 1, 6, 7], [2, 3, 4, 5])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_blocks_are_dealt_whole_and_evenly(size: int) -> None:
    for seed in range(40):
        layout = draw_layout(seed)
        is_live = draw_live(layout, seed)
        ranks = deal_blocks(layout.block_ids, is_live, size)
        assert torch.equal(ranks >= 0, is_live)
        for sequence, blocks in zip(ranks, layout.block_ids, strict=True):
            of_block = {(int(block), int(rank)) for block, rank in zip(blocks, sequence, strict=True) if rank >= 0}
            assert len(of_block) == len({block for block, _ in of_block}), "no block is cut"
            counts = [sum(rank == mine for _, rank in of_block) for mine in range(size)]
            assert max(counts) - min(counts) <= 1


def test_positions_fill_up_to_the_shortest_length_that_holds_the_fullest_sequence() -> None:
    layout = build_regular_layout(64, 8)
    block_ids, lengths = layout.block_ids.repeat(2, 1), (16, 32, 64)
    is_live = (block_ids == 5) | ((block_ids < 3) & torch.tensor([[False], [True]]))
    positions = choose_positions(block_ids, is_live, ContextShard(), lengths)
    assert positions.noisy.tolist() == [[*range(40, 48), *[-1] * 24], [*range(24), *range(40, 48)]]
    assert choose_positions(block_ids, is_live | (block_ids == 6), ContextShard(), lengths).is_whole
    nothing = choose_positions(block_ids, torch.zeros_like(is_live), ContextShard(), lengths)
    assert nothing.noisy.tolist() == [[-1] * 16] * 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_live_positions_see_what_they_see_in_the_whole_forward(size: int) -> None:
    partial = 0
    for seed in range(60):
        layout = draw_layout(seed)
        if size > 1 and layout.block_ids.max() < 8:
            continue
        is_live, mask = draw_live(layout, seed), compute_dense_mask(layout, doubled=True)
        seen = torch.zeros(layout.block_ids.shape, dtype=torch.int64)
        for positions in choose_all(layout, is_live, size):
            if positions.is_whole:
                continue
            partial += 1
            keys = find_visible_keys(layout, doubled=True).take(positions)
            noisy, places = positions.noisy, positions.find_in_whole()
            found = torch.cat(
                [
                    keys.mask_noisy(slice(None), range(keys.num_noisy)),
                    keys.mask_clean(slice(None), range(LENGTH)),
                ],
                dim=2,
            )
            for sequence in range(2):
                count = int((noisy[sequence] >= 0).sum())
                columns = torch.cat([noisy[sequence, :count], LENGTH + torch.arange(LENGTH)])
                is_real = places[sequence] >= 0
                expected = mask[sequence][places[sequence, is_real]][:, columns]
                real_keys = torch.cat([torch.arange(count), keys.num_noisy + torch.arange(LENGTH)])
                assert torch.equal(found[sequence][is_real][:, real_keys], expected)
                assert not found[sequence][is_real][:, count : keys.num_noisy].any(), "padding is seen by none"
                assert (found[sequence][~is_real].sum(dim=1) == 1).all(), "and sees itself"
                seen[sequence, noisy[sequence, :count]] += 1
        assert torch.equal(seen, is_live.long()) or not seen.any()
    assert partial > 20


@pytest.mark.parametrize("size", [1, 2])
def test_both_kernels_compute_live_positions_as_the_dense_mask_does(size: int) -> None:
    for seed in (0, 3, 5, 11):
        layout = draw_layout(seed)
        heads = [tensor.detach() for tensor in random_heads(2, 2 * LENGTH)]
        mask = compute_dense_mask(layout, doubled=True)[:, None]
        whole = scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        is_live = draw_live(layout, seed) & (layout.block_ids % 3 > 0)
        for shard, positions in zip(shards_of(size), choose_all(layout, is_live, size), strict=True):
            places = positions.find_in_whole()
            places = places.expand(2, -1)
            clean = (LENGTH + torch.arange(LENGTH)).expand(2, -1)
            keys = torch.cat([places[:, : positions.noisy.shape[1]], clean], dim=1)
            query, (key, value) = take(heads[0], places), (take(tensor, keys) for tensor in heads[1:])
            visible = find_visible_keys(layout, doubled=True).take(positions)
            chunk = shard.find_chunk_length(LENGTH) if size > 1 else None
            for attend in (build_grouped_attention(visible, chunk), build_flex_attention(visible)):
                attended = attend(query, key, value).transpose(1, 2)[places >= 0]
                expected = take(whole, places).transpose(1, 2)[places >= 0]
                torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)


def take(heads: Tensor, places: Tensor) -> Tensor:
    """Return [B, H, n, D] at places [B, n] of heads [B, H, R, D]; the first ones for padding."""
    index = places.clamp(min=0)[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3])
    return heads.gather(2, index)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], tuple(range(512, 4097, 512))),
        (["data.sequence_length=64", "stage.block_size=16"], (8, 16, 24, 32, 40, 48, 56, 64)),
        (["stage=ar"], ()),
        (["parallel.context_parallel=4"], tuple(range(128, 1025, 128))),
        (["data.sequence_length=1280", "stage.block_size=32"], (256, 384, 512, 640, 896, 1024, 1152, 1280)),
        (
            ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "data.sequence_length=96"],
            (12, 24, 36, 48),
        ),
    ],
)
def test_lengths_are_few_and_divide_over_what_splits_positions(overrides: list[str], expected: tuple[int, ...]) -> None:
    config = compose_size(["stage=joint", "model=tiny", "train.tokens=1e6", "data.sequence_length=4096", *overrides])
    assert config.noisy_lengths[: len(expected)] == expected
    assert len(config.noisy_lengths) <= 8


def test_lengths_are_whole_tiles_of_8_bit_matmuls_and_of_attention() -> None:
    config = compose_size(
        ["experiment=nld_8b_joint", "precision=fp8", "parallel.tensor_parallel=8", "parallel.sequence_parallel=true"]
    )
    whole, size = config.data.sequence_length, config.train.micro_batch_size
    assert config.noisy_lengths[-1] == whole
    for length in config.noisy_lengths:
        assert (whole + length) % 128 == 0
        assert size * (whole + length) // 8 % 16 == 0


def test_buffers_of_one_length_take_whole_forwards_alone() -> None:
    overlapped = [
        "parallel.tensor_parallel=4",
        "parallel.sequence_parallel=true",
        "parallel.overlap_tensor_parallel=true",
    ]
    config = compose_size(["experiment=nld_8b_joint", *overlapped])
    assert config.noisy_lengths == (config.data.sequence_length,)

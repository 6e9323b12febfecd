"""Context-parallel shards: a partition of the positions, and attention of each against its part of the dense mask."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from conf.composition.compose import compose_size
from conf.schema import AttentionBackend
from data_pipeline.batch import SequenceLayout
from data_pipeline.packing.form import SequenceForm
from model.attention.context import MIN_CHUNK_LENGTH, ContextShard
from model.attention.flex import build_flex_attention
from model.attention.grouped import GROUP_SIZE, GroupedAttention, build_grouped_attention
from model.attention.plan import PlanBuilder
from model.attention.visibility import (
    VisibleKeys,
    build_regular_layout,
    compute_dense_mask,
    count_visible_keys,
    find_visible_keys,
)
from tests.helpers.packed import pack_chats
from tests.model.attention.test_backends import attend_dense, random_heads

LENGTH = 256
# Texts [n] and chats [prompt, response, ...]: one document; several with block padding; short ones and padding.
PACKED = [
    [[[256]]],
    [[[20, 45], [33], [40, 20]], [[100], [3, 60]]],
    [[[5], [9], [30, 7, 11, 20]]],
]
# size of the group, block size, least length of a chunk: the last ones in several rounds.
LAYOUTS = [(2, 8, 512), (2, 32, 512), (4, 32, 512), (8, 8, 512), (2, 32, 32), (4, 8, 8)]


def build_layout(sequences: list[list[list[int]]], block_size: int, doubled: bool) -> SequenceLayout:
    """Pack as in a stage with noise; without, documents follow each other wherever they end."""
    return pack_chats(sequences, SequenceForm(LENGTH, block_size, block_size if doubled else 1)).layout


def shards_of(size: int, block_size: int = 1, min_chunk_length: int = MIN_CHUNK_LENGTH) -> list[ContextShard]:
    return [ContextShard(rank, size, None, block_size, min_chunk_length) for rank in range(size)]


def find_keys(shard: ContextShard, length: int, doubled: bool) -> torch.Tensor:
    """Return positions of the whole sequence that a shard's attention has as keys: its noisy ones, all clean ones."""
    if not doubled:
        return torch.arange(length)
    return torch.cat([shard.find_positions(length, doubled=False), torch.arange(length, 2 * length)])


def take_visible_keys(layout: SequenceLayout, shard: ContextShard, doubled: bool) -> VisibleKeys:
    positions = shard.find_whole(layout.sequence_length, doubled)
    return find_visible_keys(layout.without_repeats(), doubled).take(positions)


def attend_grouped(layout: SequenceLayout, shard: ContextShard, doubled: bool) -> GroupedAttention:
    chunk_length = shard.find_chunk_length(layout.sequence_length)
    return build_grouped_attention(take_visible_keys(layout, shard, doubled), chunk_length)


def test_shards_are_a_partition_into_matching_chunks_of_both_halves() -> None:
    positions = torch.stack([shard.find_positions(48, doubled=True) for shard in shards_of(4)])
    assert torch.equal(positions.flatten().sort().values, torch.arange(96))
    assert torch.equal(positions[:, 12:], positions[:, :12] + 48)
    assert positions[1, :12].tolist() == [*range(6, 12), *range(36, 42)]


def test_rounds_deal_out_chunks_of_whole_blocks() -> None:
    shards = shards_of(2, block_size=4, min_chunk_length=4)
    assert shards[0].count_rounds(48) == 3
    assert [chunk.start // 4 for chunk in shards[0].find_chunks(48)] == [0, 3, 4, 7, 8, 11]
    assert [chunk.start // 4 for chunk in shards[1].find_chunks(48)] == [1, 2, 5, 6, 9, 10]
    assert ContextShard(0, 4, None, 32).count_rounds(262144) == 64
    assert ContextShard(0, 4, None, 48).count_rounds(2 * 4 * 48 * 11) == 1, "528 positions: 11 blocks in one chunk"
    assert ContextShard(0, 4, None, 32).count_rounds(4096) == 1


def test_rounds_balance_packed_documents_as_one_round_does_a_single_one() -> None:
    one, packed = (build_layout(sequences, 8, doubled=True) for sequences in ([[[256]]], [[[150], [60], [40]]]))

    def imbalance(layout: SequenceLayout, min_chunk_length: int) -> float:
        shards = shards_of(4, 8, min_chunk_length)
        attended_pairs = [
            count_visible_keys(layout, doubled=True)[:, shard.find_positions(LENGTH, doubled=True)].sum().item()
            for shard in shards
        ]
        return max(attended_pairs) / (sum(attended_pairs) / len(attended_pairs))

    assert imbalance(one, LENGTH) == 1
    assert imbalance(packed, 8) < 1.15 < 1.3 < imbalance(packed, LENGTH)


def test_the_only_shard_is_the_whole_sequence() -> None:
    assert torch.equal(ContextShard().find_positions(7, doubled=True), torch.arange(14))


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("size", "block_size", "min_chunk_length"), LAYOUTS)
@pytest.mark.parametrize("sequences", PACKED)
def test_grouped_attention_of_all_shards_is_that_of_the_sequence(
    sequences: list[list[list[int]]], size: int, block_size: int, min_chunk_length: int, doubled: bool
) -> None:
    layout = build_layout(sequences, block_size, doubled)
    heads = random_heads(len(sequences), LENGTH * (2 if doubled else 1))
    expected = attend_dense(layout, doubled, heads)
    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), heads)
    loss = torch.zeros(())
    for shard in shards_of(size, block_size, min_chunk_length):
        positions, keys = shard.find_positions(LENGTH, doubled), find_keys(shard, layout.sequence_length, doubled)
        query, key, value = heads[0][:, :, positions], heads[1][:, :, keys], heads[2][:, :, keys]
        attended = attend_grouped(layout, shard, doubled)(query, key, value)
        torch.testing.assert_close(attended, expected[:, :, positions], rtol=1e-5, atol=1e-5)
        loss = loss + (attended * weight[:, :, positions]).sum()
    for mine, its in zip(torch.autograd.grad(loss, heads), expected_gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
@pytest.mark.parametrize(("sequences", "min_chunk_length"), [(PACKED[0], 512), (PACKED[1], 512), (PACKED[2], 8)])
def test_flex_attention_of_a_shard_equals_its_part_of_the_dense_mask(
    sequences: list[list[list[int]]], min_chunk_length: int, doubled: bool
) -> None:
    layout = build_layout(sequences, 8, doubled)
    heads = [tensor.detach() for tensor in random_heads(len(sequences), LENGTH * (2 if doubled else 1))]
    expected = attend_dense(layout, doubled, heads)
    for shard in shards_of(4, 8, min_chunk_length):
        positions, keys = shard.find_positions(LENGTH, doubled), find_keys(shard, layout.sequence_length, doubled)
        attend = build_flex_attention(take_visible_keys(layout, shard, doubled))
        attended = attend(heads[0][:, :, positions], heads[1][:, :, keys], heads[2][:, :, keys])
        torch.testing.assert_close(attended, expected[:, :, positions], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
def test_shards_longer_than_a_group_agree_too(doubled: bool) -> None:
    length = 4 * (GROUP_SIZE + 32)
    layout = build_regular_layout(length, 32)
    heads = [tensor.detach() for tensor in random_heads(1, length * (2 if doubled else 1))]
    mask = compute_dense_mask(layout, doubled)
    for shard in shards_of(2):
        positions, keys = shard.find_positions(length, doubled), find_keys(shard, layout.sequence_length, doubled)
        query, key, value = heads[0][:, :, positions], heads[1][:, :, keys], heads[2][:, :, keys]
        part = mask[:, positions][:, :, keys]
        expected = scaled_dot_product_attention(query, key, value, attn_mask=part[:, None], enable_gqa=True)
        torch.testing.assert_close(attend_grouped(layout, shard, doubled)(query, key, value), expected)


def test_a_plan_turns_heads_by_their_position_ids_in_the_sequence_and_is_cached() -> None:
    model = compose_size(["model=tiny", "train.tokens=1e6", "model.rope.original_max_position_embeddings=32"]).model
    where = (AttentionBackend.cpu, torch.float32, torch.device("cpu"))
    layout, shard = build_regular_layout(64, 8), ContextShard(1, 4)
    builder = PlanBuilder(model, *where, shard)
    whole, part = PlanBuilder(model, *where).build(layout, True).rotation, builder.build(layout, True).rotation
    assert torch.equal(part.cos, whole.cos[shard.find_positions(64, doubled=True)])
    assert part.query_scale is not None
    assert whole.query_scale is not None
    assert torch.equal(part.query_scale, whole.query_scale[shard.find_positions(64, doubled=True)])
    assert builder.build(build_regular_layout(32, 4), True).rotation.query_scale is None  # all would be 1
    assert builder.build(layout, True) is builder.build(build_regular_layout(64, 8), True)


def test_a_shard_that_cuts_a_block_is_refused() -> None:
    model = compose_size(["model=tiny", "train.tokens=1e6"]).model
    builder = PlanBuilder(model, AttentionBackend.cpu, torch.float32, torch.device("cpu"), ContextShard(0, 4))
    with pytest.raises(AssertionError, match="cuts a block"):
        builder.build(build_regular_layout(64, 16), doubled=True)


@pytest.mark.gpu
@pytest.mark.parametrize("min_chunk_length", [4096, 128])
def test_flex_attention_of_all_shards_trains_on_the_gpu(min_chunk_length: int) -> None:
    layout = build_regular_layout(1024, 32)
    heads = [tensor.detach().cuda().requires_grad_() for tensor in random_heads(1, 2048)]
    expected = attend_dense(layout.to(heads[0].device), True, heads)
    loss = torch.zeros((), device="cuda")
    for shard in shards_of(2, 32, min_chunk_length):
        positions, keys = shard.find_positions(1024, doubled=True).cuda(), find_keys(shard, 1024, doubled=True).cuda()
        query, key, value = heads[0][:, :, positions], heads[1][:, :, keys], heads[2][:, :, keys]
        attended = build_flex_attention(take_visible_keys(layout, shard, True).to(heads[0].device))(query, key, value)
        torch.testing.assert_close(attended, expected[:, :, positions], rtol=1e-3, atol=1e-3)
        loss = loss + attended.sum()
    for mine, its in zip(torch.autograd.grad(loss, heads), torch.autograd.grad(expected.sum(), heads), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-2, atol=1e-2)

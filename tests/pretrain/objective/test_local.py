"""Rows of one context-parallel rank: together they are the microbatch, each row and its score exactly once."""

import pytest
import torch

from data_pipeline.noise import NoiseSource, add_noise
from data_pipeline.packing.form import SequenceForm
from model.attention.context import ContextShard
from pretrain.objective.local import take_local_rows
from pretrain.objective.rows import ForwardInput, build_ar_input, build_joint_input
from tests.helpers.packed import pack_chats

MASK, LENGTH = 1, 128


def build_input(doubled: bool) -> ForwardInput:
    """Two sequences of chats and texts."""
    batch = pack_chats([[[5, 20, 3, 16], [7, 16]], [[60], [9, 30]]], SequenceForm(LENGTH, 8, 8))
    if not doubled:
        return build_ar_input(batch)
    return build_joint_input(add_noise(batch, NoiseSource(1, "joint", "train", 1e-3), MASK))


@pytest.mark.parametrize("chunk_rows", [512, 8])
@pytest.mark.parametrize("doubled", [False, True], ids=["ar", "joint"])
def test_every_scored_row_is_on_one_rank_with_its_token_and_target(doubled: bool, chunk_rows: int) -> None:
    item = build_input(doubled)
    found = {}
    for rank in range(4):
        shard = ContextShard(rank, 4, None, 8, chunk_rows)
        tokens, selection = take_local_rows(item, shard)
        rows = shard.rows(LENGTH, doubled)
        for number, target, is_noisy, inverse_p in zip(
            *(field.tolist() for field in vars(selection).values()), strict=True
        ):
            row, sequence = divmod(number, len(tokens))
            assert tokens[sequence, row] == item.tokens[sequence, rows[row]]
            place = int(rows[row]) * len(tokens) + sequence
            assert place not in found
            found[place] = (target, is_noisy, inverse_p)
    whole = item.selection
    values = zip(whole.targets.tolist(), whole.is_noisy.tolist(), whole.inverse_p.tolist(), strict=True)
    assert found == dict(zip(whole.rows.tolist(), values, strict=True))


def test_the_whole_sequence_is_left_as_it_is() -> None:
    item = build_input(doubled=True)
    tokens, selection = take_local_rows(item, ContextShard())
    assert tokens is item.tokens
    assert selection is item.selection


def test_a_rank_may_have_nothing_to_score() -> None:
    batch = pack_chats([[[8]]], SequenceForm(LENGTH, 8, 8))
    _, selection = take_local_rows(build_ar_input(batch), ContextShard(1, 2))
    assert selection.rows.tolist() == []
    assert selection.targets.dtype == torch.int64

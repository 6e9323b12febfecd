"""Drafted blocks: which seeds, which positions count, who sees whom."""

import numpy as np
import torch

from data_pipeline.order import derive_key
from lora.blocks import (
    DraftBatch,
    build_block_mask,
    build_block_positions,
    build_block_tokens,
    build_draft_batch,
    choose_anchors,
    gather_targets,
)
from lora.examples import Example

BLOCK, MASK = 4, 99


def make_example(length: int, answers: list[tuple[int, int]]) -> Example:
    drafted = np.zeros(length, dtype=bool)
    for start, end in answers:
        drafted[start:end] = True
    return Example(np.arange(100, 100 + length), drafted)


def build(examples: list[Example], blocks: int, seed: int = 0) -> DraftBatch:
    indices = list(range(len(examples)))
    return build_draft_batch(examples, indices, blocks=blocks, block_size=BLOCK, seed=seed)


def test_anchors_are_answer_tokens_that_another_one_follows() -> None:
    example = make_example(20, [(3, 6), (10, 11), (15, 20)])
    assert choose_anchors(example.drafted, 100, key=0).tolist() == [3, 4, 15, 16, 17, 18]


def test_anchors_are_different_and_change_with_the_sample_index() -> None:
    drafted = make_example(200, [(1, 200)]).drafted
    draws = [choose_anchors(drafted, 20, derive_key(5, index)) for index in range(50)]
    assert all(len(set(draw.tolist())) == 20 and (np.diff(draw) > 0).all() for draw in draws)
    assert len({tuple(draw.tolist()) for draw in draws}) == 50
    counts = np.bincount(np.concatenate(draws), minlength=200)[1:199]
    assert counts.max() < 20  # expected 5 each


def test_a_batch_depends_on_seed_and_sample_indices_alone() -> None:
    examples = [make_example(60, [(10, 60)]), make_example(40, [(20, 40)])]
    together = build(examples, 6)
    alone = build_draft_batch(examples[1:], [1], blocks=6, block_size=BLOCK, seed=0)
    assert torch.equal(together.anchors[1], alone.anchors[0])
    assert not torch.equal(build(examples, 6, seed=1).anchors, together.anchors)


def test_positions_count_up_to_the_end_of_the_answer() -> None:
    batch = build([make_example(12, [(2, 5), (9, 12)])], blocks=10)
    counted = dict(zip(batch.anchors[0].tolist(), batch.scored[0].tolist(), strict=True))
    assert counted[2] == [True, True, False]
    assert counted[3] == [True, False, False]
    assert counted[9] == [True, True, False]
    assert counted[10] == [True, False, False]
    assert batch.num_blocks == 4
    assert not batch.scored[0, 4:].any()


def test_rows_are_a_seed_and_masks_at_the_positions_behind_it() -> None:
    batch = build([make_example(30, [(1, 30)])], blocks=3)
    tokens = build_block_tokens(batch, MASK).view(3, BLOCK)
    positions = build_block_positions(batch).view(3, BLOCK)
    for block, anchor in enumerate(batch.anchors[0].tolist()):
        assert tokens[block].tolist() == [100 + anchor, MASK, MASK, MASK]
        assert positions[block].tolist() == list(range(anchor, anchor + BLOCK))
        inside = batch.scored[0, block].sum()
        expected = list(range(101 + anchor, 101 + anchor + inside))
        assert gather_targets(batch)[0, block, :inside].tolist() == expected


def test_a_row_sees_earlier_clean_tokens_and_its_own_block() -> None:
    batch = build([make_example(30, [(1, 30)]), make_example(14, [(5, 14)])], blocks=3)
    mask = build_block_mask(batch)[:, 0]
    for sequence in range(2):
        for row in range(3 * BLOCK):
            block = row // BLOCK
            clean = [key < batch.anchors[sequence, block] for key in range(30)]
            own = [key // BLOCK == block for key in range(3 * BLOCK)]
            assert mask[sequence, row].tolist() == [*map(bool, clean), *own]

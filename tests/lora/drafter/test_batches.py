"""Batches of drafted blocks: which tokens are seeds, and which positions count."""

import numpy as np
import torch

from data_pipeline.order import derive_key
from lora.drafter.batches import DraftBatch, build_draft_batch, choose_anchors
from lora.examples.example_set import Example

BLOCK = 4


def make_example(length: int, responses: list[tuple[int, int]]) -> Example:
    drafted = np.zeros(length, dtype=bool)
    for start, end in responses:
        drafted[start:end] = True
    return Example(np.arange(100, 100 + length), drafted)


def build(examples: list[Example], blocks: int, seed: int = 0) -> DraftBatch:
    indices = list(range(len(examples)))
    return build_draft_batch(examples, indices, blocks=blocks, block_size=BLOCK, seed=seed)


def test_anchors_are_response_tokens_that_another_one_follows() -> None:
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
    assert torch.equal(together.draws[1], alone.draws[0])
    assert not torch.equal(together.draws[0], together.draws[1])
    assert not torch.equal(build(examples, 6, seed=1).anchors, together.anchors)


def test_positions_count_up_to_the_end_of_the_response() -> None:
    batch = build([make_example(12, [(2, 5), (9, 12)])], blocks=10)
    counted = dict(zip(batch.anchors[0].tolist(), batch.scored[0].tolist(), strict=True))
    assert counted[2] == [True, True, False]
    assert counted[3] == [True, False, False]
    assert counted[9] == [True, True, False]
    assert counted[10] == [True, False, False]
    assert batch.num_blocks == 4
    assert not batch.scored[0, 4:].any()


def test_draws_are_uniform_and_stay_with_their_blocks() -> None:
    batch = build([make_example(400, [(1, 400)])] * 4, 90)
    assert batch.draws.shape == (4, 90, BLOCK)
    assert batch.draws.min() >= 0 and batch.draws.max() < 1
    assert torch.allclose(batch.draws.flatten().histc(4, 0, 1) / batch.draws.numel(), torch.tensor(0.25), atol=0.04)
    assert torch.equal(batch.trim(3).draws, batch.draws[:, :3])

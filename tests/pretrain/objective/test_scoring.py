"""Positions are scored and counted as the objective demands; a context-parallel rank has its part."""

from itertools import pairwise

import pytest
import torch

from conf.schema import Objective
from data_pipeline.noise import NoiseSource, add_noise
from data_pipeline.packing.form import SequenceForm
from model.attention.context import ContextShard
from pretrain.objective.scoring import StepCounts, count_step, score_ar, take_local
from tests.data_pipeline.test_noise import MASK, make_batch
from tests.helpers.objective import ObjectiveInput, apply_objective
from tests.helpers.packed import pack_chats

SOURCE = NoiseSource(seed=1, stage="joint", split="train", epsilon=1e-3)
LENGTH = 128
BOTH = pytest.mark.parametrize("objective", Objective)


def build_input(objective: Objective) -> ObjectiveInput:
    """Build two sequences of chats and texts."""
    batch = pack_chats([[[5, 20, 3, 16], [7, 16]], [[60], [9, 30]]], SequenceForm(LENGTH, 8, 8))
    return apply_objective(add_noise(batch, SOURCE, MASK), objective)


def test_no_ar_target_crosses_a_document() -> None:
    batch = make_batch([0], length=64, document_length=16)
    scored = score_ar(batch)
    seen = {"attended_pairs": 4 * 16 * 17 // 2, "computed_positions": 80}
    assert count_step(batch, scored, None, 80) == StepCounts(4 * 15, maskable=64, text=64, positions=64, **seen)
    assert not set(scored.positions.tolist()) & {15, 31, 47, 63}


def test_clean_position_s_minus_1_predicts_token_s() -> None:
    batch = make_batch([0], length=64)
    scored = score_ar(batch)
    assert torch.equal(scored.targets, batch.tokens[0][scored.positions + 1])


def test_counts_of_microbatches_add_up() -> None:
    noisy = [add_noise(make_batch(indices, length=64), SOURCE, MASK) for indices in ([0], [1], [0, 1])]
    parts = [apply_objective(item, Objective.joint).counts for item in noisy]
    assert parts[0] + parts[1] == parts[2]


def test_the_last_prompt_token_predicts_a_response_across_padding() -> None:
    batch = pack_chats([[[5, 20, 3, 16], [7, 16]]], SequenceForm(128, 16, 16))
    scored = score_ar(batch)
    text = [index for index in range(128) if batch.document_ids[0, index] >= 0 and not batch.block_padding[0, index]]
    wanted = {
        (before, after)
        for before, after in pairwise(text)
        if batch.loss_mask[0, after] and batch.document_ids[0, before] == batch.document_ids[0, after]
    }
    assert (4, 16) in wanted, "position 4 ends a prompt, position 16 begins its response"
    tokens = {(before, int(batch.tokens[0, after])) for before, after in wanted}
    assert set(zip(scored.positions.tolist(), scored.targets.tolist(), strict=True)) == tokens
    assert len(scored.positions) == 20 + 16 + 16


@pytest.mark.parametrize("block_padding_loss", [True, False])
def test_block_padding_is_scored_by_the_diffusion_objective_alone(block_padding_loss: bool) -> None:
    batch = pack_chats([[[5, 20, 3, 18], [7, 10]]], SequenceForm(128, 16, 16, block_padding_loss=block_padding_loss))
    noisy = add_noise(batch, SOURCE, MASK)
    item = apply_objective(noisy, Objective.joint)
    is_scored = torch.zeros(128, dtype=torch.bool)
    is_scored[item.scored.positions[item.scored.is_noisy]] = True
    allowed = batch.loss_mask[0] if block_padding_loss else batch.loss_mask[0] & ~batch.block_padding[0]
    assert torch.equal(is_scored, noisy.masked[0] & allowed)
    assert torch.equal(item.scored.is_text[item.scored.is_noisy], ~batch.block_padding[0, is_scored])
    assert item.scored.is_text[~item.scored.is_noisy].all()
    assert item.counts.clean == 20 + 18 + 10
    assert (item.counts.text, item.counts.prompt) == (20 + 18 + 10, 5 + 3 + 7)
    assert (item.counts.block_padding, item.counts.padding) == (12 + 14 + 6, 11 + 13 + 9)
    assert item.counts.maskable == int(allowed.sum())


@BOTH
@pytest.mark.parametrize("min_chunk_length", [512, 8])
def test_every_scored_position_is_on_one_rank_with_its_token_and_target(
    objective: Objective, min_chunk_length: int
) -> None:
    item = build_input(objective)
    found = {}
    for rank in range(4):
        shard = ContextShard(rank, 4, None, 8, min_chunk_length)
        tokens, scored = take_local(item.tokens, item.scored, shard.find_whole(LENGTH, item.doubled))
        positions = shard.find_positions(LENGTH, item.doubled)
        for number, *values in zip(*(field.tolist() for field in scored.fields()), strict=True):
            position, sequence = divmod(number, len(tokens))
            assert tokens[sequence, position] == item.tokens[sequence, positions[position]]
            place = int(positions[position]) * len(tokens) + sequence
            assert place not in found
            found[place] = values
    wanted = zip(*(field.tolist() for field in item.scored.fields()), strict=True)
    assert found == {place: values for place, *values in wanted}


def test_a_rank_may_have_nothing_to_score() -> None:
    batch = pack_chats([[[8]]], SequenceForm(LENGTH, 8, 8))
    _, scored = take_local(batch.tokens, score_ar(batch), ContextShard(1, 2).find_whole(LENGTH, doubled=False))
    assert scored.positions.tolist() == []
    assert scored.targets.dtype == torch.int64

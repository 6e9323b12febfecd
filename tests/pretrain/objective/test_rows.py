"""Which rows are scored, and that their weighted sum is the loss as the definition writes it."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

from conf.schema import LossNormalization, Objective, StageConfig
from data_pipeline.noise import NoiseSource, add_noise
from data_pipeline.packing.form import SequenceForm
from pretrain.objective.rows import StepCounts, build_ar_input, build_joint_input, compute_row_weights
from tests.data_pipeline.test_noise import MASK, make_batch
from tests.helpers.packed import pack_chats

VOCAB = 128
SOURCE = NoiseSource(seed=1, stage="joint", split="train", epsilon=1e-3)


def weighted_loss(stage: StageConfig, logits: torch.Tensor, document_length: int = 64) -> tuple[float, float]:
    """(loss through selected rows, loss by the definition) for logits [B, R, V] of two sequences of 64 tokens."""
    batch = make_batch([0, 1], length=64, document_length=document_length)
    batch.loss_mask[0, :20] = False
    noisy = add_noise(batch, SOURCE, MASK)
    item = build_joint_input(noisy)
    scored = compute_row_weights(item.selection, item.counts, stage)
    selected = logits.transpose(0, 1).flatten(0, 1)[scored.rows]
    ours = (cross_entropy(selected, scored.targets, reduction="none") * scored.weights).sum()

    noisy_ce = cross_entropy(logits[:, :64].transpose(1, 2), batch.tokens, reduction="none")
    clean_ce = cross_entropy(logits[:, 64:-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    inside = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
    clean_scored = batch.loss_mask[:, 1:] & inside
    diffusion = (noisy_ce / noisy.p_mask)[noisy.masked].sum() * stage.diffusion_weight
    ar, num_masked, num_clean = clean_ce[clean_scored].sum(), noisy.masked.sum(), clean_scored.sum()
    if stage.loss_normalization is LossNormalization.global_average:
        return ours.item(), ((diffusion + ar) / (num_masked + num_clean)).item()
    return ours.item(), (diffusion / num_masked + ar / num_clean).item()


@pytest.mark.parametrize("normalization", LossNormalization)
@pytest.mark.parametrize("document_length", [64, 16])
def test_the_weighted_rows_sum_to_the_loss(normalization: LossNormalization, document_length: int) -> None:
    stage = StageConfig(name="joint", objective=Objective.joint, loss_normalization=normalization)
    ours, expected = weighted_loss(stage, torch.randn(2, 128, VOCAB), document_length)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_no_ar_target_crosses_a_document() -> None:
    item = build_ar_input(make_batch([0], length=64, document_length=16))
    assert item.counts == StepCounts(clean=4 * 15, maskable=64, text=64, rows=64, pairs=4 * 16 * 17 // 2)
    assert not set(item.selection.rows.tolist()) & {15, 31, 47, 63}


def test_clean_row_s_minus_1_predicts_token_s() -> None:
    batch = make_batch([0], length=64)
    selection = build_ar_input(batch).selection
    assert torch.equal(selection.targets, batch.tokens[0][selection.rows + 1])


def test_counts_of_microbatches_add_up() -> None:
    noisy = [add_noise(make_batch(indices, length=64), SOURCE, MASK) for indices in ([0], [1], [0, 1])]
    parts = [build_joint_input(item).counts for item in noisy]
    assert parts[0] + parts[1] == parts[2]


def test_the_last_context_token_predicts_an_answer_across_padding() -> None:
    batch = pack_chats([[[5, 20, 3, 16], [7, 16]]], SequenceForm(128, 16, 16))
    selection = build_ar_input(batch).selection
    text = [row for row in range(128) if batch.document_ids[0, row] >= 0 and not batch.block_padding[0, row]]
    wanted = {
        (before, after)
        for before, after in pairwise(text)
        if batch.loss_mask[0, after] and batch.document_ids[0, before] == batch.document_ids[0, after]
    }
    assert (4, 16) in wanted, "row 4 ends a context, row 16 begins its answer"
    tokens = {(row, int(batch.tokens[0, after])) for row, after in wanted}
    assert set(zip(selection.rows.tolist(), selection.targets.tolist(), strict=True)) == tokens
    assert len(selection.rows) == 20 + 16 + 16


@pytest.mark.parametrize("block_padding_loss", [True, False])
def test_block_padding_is_scored_by_the_diffusion_objective_alone(block_padding_loss: bool) -> None:
    batch = pack_chats([[[5, 20, 3, 18], [7, 10]]], SequenceForm(128, 16, 16, block_padding_loss=block_padding_loss))
    noisy = add_noise(batch, SOURCE, MASK)
    item = build_joint_input(noisy)
    noisy_rows = item.selection.rows[item.selection.is_noisy]
    scored = torch.zeros(128, dtype=torch.bool)
    scored[noisy_rows] = True
    allowed = batch.loss_mask[0] if block_padding_loss else batch.loss_mask[0] & ~batch.block_padding[0]
    assert torch.equal(scored, noisy.masked[0] & allowed)
    assert item.counts.clean == 20 + 18 + 10
    assert (item.counts.text, item.counts.context) == (20 + 18 + 10, 5 + 3 + 7)
    assert (item.counts.block_padding, item.counts.padding) == (12 + 14 + 6, 11 + 13 + 9)
    assert item.counts.maskable == int(allowed.sum())

"""The weighted sum of cross entropies is the loss as the formulas say, and the logged numbers give it back."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from conf.schema import LossNormalization, Objective, StageConfig
from data_pipeline.noise import NoiseSource, add_noise
from data_pipeline.packing.form import SequenceForm
from pretrain.objective.losses import LossStats, compute_loss_sums, weigh
from tests.data_pipeline.test_noise import MASK, make_batch
from tests.helpers.objective import apply_objective
from tests.helpers.packed import pack_chats

VOCAB = 128
SOURCE = NoiseSource(seed=1, stage="joint", split="train", epsilon=1e-3)
NORMALIZATIONS = pytest.mark.parametrize("normalization", LossNormalization)


def build_stage(normalization: LossNormalization, objective: Objective = Objective.joint) -> StageConfig:
    return StageConfig(name=objective.value, objective=objective, loss_normalization=normalization)


def weighted_loss(stage: StageConfig, logits: torch.Tensor, document_length: int = 64) -> tuple[float, float]:
    """Return (loss through scored positions, loss by the definition) for logits [B, R, V] of two 64-token sequences."""
    batch = make_batch([0, 1], length=64, document_length=document_length)
    batch.loss_mask[0, :20] = False
    noisy = add_noise(batch, SOURCE, MASK)
    item = apply_objective(noisy, Objective.joint)
    scored = weigh(item.scored, item.counts, stage)
    selected = logits.transpose(0, 1).flatten(0, 1)[scored.positions]
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


@NORMALIZATIONS
@pytest.mark.parametrize("document_length", [64, 16])
def test_the_weighted_positions_sum_to_the_loss(normalization: LossNormalization, document_length: int) -> None:
    ours, expected = weighted_loss(build_stage(normalization), torch.randn(2, 128, VOCAB), document_length)
    assert ours == pytest.approx(expected, rel=1e-5)


@NORMALIZATIONS
@pytest.mark.parametrize("objective", Objective)
def test_the_logged_terms_sum_to_the_logged_loss(normalization: LossNormalization, objective: Objective) -> None:
    """Over two microbatches of chats with block padding."""
    stage = build_stage(normalization, objective)
    batches = [pack_chats([chats], SequenceForm(64, 8, 8)) for chats in ([[5, 20, 3, 16]], [[9, 3], [13]])]
    items = [apply_objective(add_noise(batch, SOURCE, MASK), objective) for batch in batches]
    counts = items[0].counts + items[1].counts
    sums = torch.zeros(5, dtype=torch.float64)
    for item in items:
        scored = weigh(item.scored, counts, stage)
        losses = torch.rand(len(scored.positions), generator=torch.Generator().manual_seed(0)) * 5
        sums += compute_loss_sums((losses * scored.weights).sum(), losses, scored)
    stats = LossStats.from_sums(sums.tolist(), counts, stage)
    assert stats.ar_term + (stats.diffusion_term or 0) == pytest.approx(stats.loss, rel=1e-6)
    if normalization is LossNormalization.per_objective:
        assert stats.ar_term == stats.ar_loss
    if objective is Objective.joint and stats.diffusion_loss is not None:
        divided_by = {
            LossNormalization.global_average: counts.clean + counts.masked,
            LossNormalization.per_objective: counts.masked,
        }
        weight = stage.diffusion_weight * counts.maskable / divided_by[normalization]
        assert stats.diffusion_term == pytest.approx(weight * stats.diffusion_loss)


def test_the_diffusion_loss_of_text_leaves_block_padding_out() -> None:
    stage = build_stage(LossNormalization.global_average)
    batch = pack_chats([[[5, 20, 3, 18], [7, 10]]], SequenceForm(128, 16, 16))
    noisy = add_noise(batch, SOURCE, MASK)
    item = apply_objective(noisy, Objective.joint)
    scored = weigh(item.scored, item.counts, stage)
    easy = torch.where(scored.is_text, 2.0, 0.0)  # block padding is predicted for certain
    sums = compute_loss_sums((easy * scored.weights).sum(), easy, scored)
    stats = LossStats.from_sums(sums.tolist(), item.counts, stage)
    masked_text = noisy.masked & batch.loss_mask & ~batch.block_padding
    bound = (2.0 / noisy.p_mask[masked_text]).sum().item()
    assert stats.diffusion_text_loss == pytest.approx(bound / 48)
    assert stats.diffusion_loss == pytest.approx(bound / (48 + 32)), "block padding makes it look easier than it is"


def test_without_noise_there_are_no_diffusion_losses() -> None:
    stage = build_stage(LossNormalization.global_average, Objective.ar)
    item = apply_objective(add_noise(make_batch([0], length=64), SOURCE, MASK), Objective.ar)
    stats = LossStats.from_sums([1.0] * 5, item.counts, stage)
    assert (stats.diffusion_term, stats.diffusion_loss, stats.diffusion_text_loss) == (None, None, None)

"""Losses of drafts against slow restatements, finite differences and simulated speculation."""

import math

import pytest
import torch
from torch import Tensor

from conf.schema.drafter import DraftLoss, DraftObjectiveConfig, PositionWeights
from lora.drafter.objective import score_drafts

BLOCKS, POSITIONS, VOCAB = 5, 4, 7
LOSSES = [loss for loss in DraftLoss if loss is not DraftLoss.verified]  # which has a file of its own


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (draft, teacher, targets, scored) with blocks of 4, 4, 3, 1 and 0 positions that count."""
    torch.manual_seed(0)
    draft, teacher = (2 * torch.randn(BLOCKS, POSITIONS, VOCAB, dtype=torch.float64) for _ in range(2))
    scored = torch.arange(POSITIONS) < torch.tensor([4, 4, 3, 1, 0])[:, None]
    return draft, teacher, torch.randint(VOCAB, (BLOCKS, POSITIONS)), scored


def restate(
    draft: Tensor, teacher: Tensor, targets: Tensor, scored: Tensor, config: DraftObjectiveConfig
) -> tuple[float, list[int], list[float]]:
    """Return (loss, accepted greedily, accepted by sampling), computed position by position."""
    total, greedy, sampled = 0.0, [], []
    for block in range(BLOCKS):
        reach = weight = 1.0
        expected, count, goes_on = 0.0, 0, True
        for position in range(POSITIONS):
            if not scored[block, position]:
                break
            q, p = draft[block, position].softmax(0).tolist(), teacher[block, position].softmax(0).tolist()
            overlap = sum(map(min, p, q))
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            share = math.exp(-config.hybrid_rate * overlap)
            cost = {
                DraftLoss.argmax: -math.log(q[p.index(max(p))]),
                DraftLoss.data: -math.log(q[int(targets[block, position])]),
                DraftLoss.kl: kl,
                DraftLoss.tv: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
                DraftLoss.hybrid: share * kl + (1 - share) * (1 - overlap),
                DraftLoss.expected_length: -reach * overlap,
            }[config.loss]
            is_weighted = (
                config.position_weights is PositionWeights.reach and config.loss is not DraftLoss.expected_length
            )
            total += cost * (weight if is_weighted else 1.0)
            reach *= overlap
            weight *= max(overlap, config.reach_floor)
            expected += reach
            goes_on = goes_on and p.index(max(p)) == q.index(max(q))
            count += goes_on
        greedy.append(count)
        sampled.append(expected)
    return total, greedy, sampled


@pytest.mark.parametrize("weights", PositionWeights)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_what_its_definition_says(
    logits: tuple[Tensor, Tensor, Tensor, Tensor], loss: DraftLoss, weights: PositionWeights
) -> None:
    config = DraftObjectiveConfig(loss, weights)
    score = score_drafts(*logits, config)
    total, greedy, sampled = restate(*logits, config)
    assert score.loss.item() == pytest.approx(total, rel=1e-12)
    assert score.accepted_greedy.tolist() == greedy
    assert score.accepted_sampled.tolist() == pytest.approx(sampled, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_finite_differences_and_vanish_where_nothing_counts(
    logits: tuple[Tensor, Tensor, Tensor, Tensor], loss: DraftLoss
) -> None:
    draft, teacher, targets, scored = logits
    # Weights and the share of hybrid are constants of a step, so they are left out of the comparison.
    config = DraftObjectiveConfig(loss, PositionWeights.none, hybrid_rate=0.0)
    draft.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: score_drafts(x, teacher, targets, scored, config).loss, draft)
    (gradient,) = torch.autograd.grad(score_drafts(draft, teacher, targets, scored, config).loss, draft)
    assert not gradient[~scored].any()


def test_expected_acceptance_is_that_of_rejection_sampling(logits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    from model.hf.sampling import Draft, Sampler

    draft, teacher, targets, scored = (tensor[:1] for tensor in logits)
    rounds = 40_000
    probabilities = draft.softmax(-1).expand(rounds, -1, -1)
    bonus = teacher.new_zeros(1, 1, VOCAB)
    sampler = Sampler(temperature=1.0)
    drawn = Draft(sampler.draw(probabilities), probabilities)
    verification = sampler.verify(drawn, torch.cat([teacher, bonus], dim=1).expand(rounds, -1, -1))
    expected = score_drafts(draft, teacher, targets, scored, DraftObjectiveConfig()).accepted_sampled.item()
    counts = verification.num_accepted.double()
    assert counts.mean().item() == pytest.approx(expected, abs=5 * counts.std().item() / math.sqrt(rounds))

"""The report's objective against a slow restatement in float64: drafts, active positions, value and gradient."""

import math
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from conf.schema.drafter import DraftLoss, DraftObjectiveConfig, VerifiedDraftConfig, VerifiedPositions
from lora.drafter.distributions import restrict_to_likely
from lora.drafter.objective import score_drafts
from lora.drafter.verified_objective import VerifiedDraft, compute_verified_loss, draw_drafts, find_active

BLOCKS, POSITIONS, VOCAB = 6, 4, 7
REPORT = VerifiedDraftConfig(support=3)  # a top set that leaves something out of so small a vocabulary
VARIANTS = {
    "report": REPORT,
    "no truncation": replace(REPORT, support=None),
    "all positions": replace(REPORT, positions=VerifiedPositions.all),
    "no cross entropy": replace(REPORT, argmax_weight=0.0),
    "no matching": replace(REPORT, matching_weight=0.0),
    "every number changed": VerifiedDraftConfig(
        sampled_share=0.5,
        draft_temperature=0.7,
        matching_weight=0.3,
        matching_temperature=2.0,
        matching_rate=1.5,
        argmax_weight=1.7,
        argmax_temperature=1.3,
        support=2,
    ),
}


@dataclass(frozen=True)
class Blocks:
    """Logits of drafter and verifier [M, D, V], scored [M, D] and draws [M, 1 + D]; 4, 4, 4, 3, 1 and 0 scored."""

    drafter: Tensor
    verifier: Tensor
    scored: Tensor
    draws: Tensor


@pytest.fixture
def blocks() -> Blocks:
    """Build models that agree often enough for drafts to be accepted, and not always."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    common = 4 * random(BLOCKS, POSITIONS, VOCAB)
    drafter, verifier = (common + random(BLOCKS, POSITIONS, VOCAB) for _ in range(2))
    scored = torch.arange(POSITIONS) < torch.tensor([4, 4, 4, 3, 1, 0])[:, None]
    return Blocks(drafter, verifier, scored, torch.rand(BLOCKS, 1 + POSITIONS, generator=generator))


def verify(blocks: Blocks, config: VerifiedDraftConfig) -> VerifiedDraft:
    drafts = draw_drafts(blocks.drafter, blocks.draws, config)
    return VerifiedDraft(drafts, drafts, blocks.verifier)


# The restatement: lists of numbers, position by position.


def restate_softmax(logits: list[float], temperature: float, support: set[int]) -> list[float]:
    weights = [math.exp(value / temperature) if token in support else 0.0 for token, value in enumerate(logits)]
    return [weight / sum(weights) for weight in weights]


def restate_draft(logits: list[float], is_sampled: bool, draw: float, config: VerifiedDraftConfig) -> int:
    if not is_sampled:
        return logits.index(max(logits))
    total = 0.0
    for token, probability in enumerate(restate_softmax(logits, config.draft_temperature, set(range(VOCAB)))):
        total += probability
        if total > draw:
            return token
    raise AssertionError("a draw below 1 ends at a token")


def restate_top(logits: list[float], size: int | None) -> set[int]:
    return set(sorted(range(VOCAB), key=lambda token: -logits[token])[:size])


def restate_loss(
    blocks: Blocks, config: VerifiedDraftConfig, drafts: list[list[int]], at: Tensor | None = None
) -> float:
    """Return the sum over blocks. drafts: of the step. at: logits that w is computed at, a constant of the step."""
    drafter, verifier = blocks.drafter.tolist(), blocks.verifier.tolist()
    fixed = (blocks.drafter if at is None else at).tolist()
    loss = 0.0
    for block in range(BLOCKS):
        matching, cross_entropy = [], []
        is_active = True
        for position in range(int(blocks.scored[block].sum())):
            q, p, q_fixed = drafter[block][position], verifier[block][position], fixed[block][position]
            choice = p.index(max(p))
            if is_active or config.positions is VerifiedPositions.all:
                support = restate_top(q_fixed, config.support) | restate_top(p, config.support)
                temperature = config.matching_temperature
                q_m, p_m, q_w = (restate_softmax(values, temperature, support) for values in (q, p, q_fixed))
                overlap = sum(map(min, p_m, q_m))
                kl = sum(a * math.log(a / b) for a, b in zip(p_m, q_m, strict=True) if a)
                w = math.exp(-config.matching_rate * sum(map(min, p_m, q_w)))
                matching.append(w * kl + (1 - w) * (1 - overlap))
                if choice in support:  # else 0, and out of the denominator
                    cross_entropy.append(-math.log(restate_softmax(q, config.argmax_temperature, support)[choice]))
            is_active = is_active and drafts[block][position] == choice
        if matching:
            loss += config.matching_weight * sum(matching) / len(matching)
            loss += config.argmax_weight * sum(cross_entropy) / max(len(cross_entropy), 1)
    return loss


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_value_and_gradient_are_those_of_the_restatement(blocks: Blocks, config: VerifiedDraftConfig) -> None:
    draft = verify(blocks, config)
    drafter = blocks.drafter.clone().requires_grad_()
    loss = compute_verified_loss(drafter, draft, blocks.scored, config)
    drafts = draft.tokens.tolist()
    assert loss.item() == pytest.approx(restate_loss(blocks, config, drafts), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, drafter)
    expected = torch.zeros_like(gradient)
    step = 1e-6
    for place in product(range(BLOCKS), range(POSITIONS), range(VOCAB)):
        values = []
        for shift in (step, -step):
            shifted = blocks.drafter.clone()
            shifted[place] += shift
            values.append(restate_loss(replace(blocks, drafter=shifted), config, drafts, at=blocks.drafter))
        expected[place] = (values[0] - values[1]) / (2 * step)
    assert expected.abs().max() > 0.01
    assert torch.allclose(gradient, expected, atol=1e-8)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_drafts_are_drawn_as_the_draws_say(blocks: Blocks, config: VerifiedDraftConfig) -> None:
    drafts = draw_drafts(blocks.drafter, blocks.draws, config).tolist()
    for block, (decides, *draws) in enumerate(blocks.draws.tolist()):
        logits = blocks.drafter[block].tolist()
        is_sampled = decides < config.sampled_share
        expected = [restate_draft(*each, config) for each in zip(logits, [is_sampled] * POSITIONS, draws, strict=True)]
        assert drafts[block] == expected


def test_nine_of_ten_drafts_are_sampled_from_the_drafter_and_the_others_greedy() -> None:
    rounds = 60_000
    logits = torch.tensor([0.0, 1.0, 2.5, -1.0], dtype=torch.float64).expand(rounds, 1, 4)
    draws = torch.rand(rounds, 2, generator=torch.Generator().manual_seed(0))
    counts = draw_drafts(logits, draws, VerifiedDraftConfig())[:, 0].bincount(minlength=4) / rounds
    expected = 0.9 * logits[0, 0].softmax(-1)
    expected[2] += 0.1
    assert torch.allclose(counts.double(), expected, atol=0.01)


def test_active_are_the_accepted_prefix_and_the_first_rejection() -> None:
    choices = torch.tensor([[1, 2, 3, 4]] * 5)
    logits = torch.nn.functional.one_hot(choices, VOCAB).double()
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 4], [0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    scored = torch.ones(5, 4, dtype=torch.bool)
    scored[3, 2:] = False
    read = tokens.clone()
    read[4, 1] = 6  # the text goes another way than the verifier
    active = find_active(VerifiedDraft(tokens, read, logits), scored)
    assert active.sum(-1).tolist() == [4, 3, 1, 2, 2]
    assert all(row == sorted(row, reverse=True) for row in active.tolist())


def test_a_position_after_the_first_rejection_costs_nothing_and_is_not_counted(blocks: Blocks) -> None:
    draft = verify(blocks, REPORT)
    active = find_active(draft, blocks.scored)
    assert (active.sum(-1) < blocks.scored.sum(-1)).any() and (active.sum(-1) > 1).any()
    noise = torch.randn(blocks.verifier.shape, dtype=torch.float64) * ~active[..., None]
    changed = VerifiedDraft(draft.tokens, draft.read, blocks.verifier + 9 * noise)
    # Only where the draft is rejected before: the first rejection itself stays.
    losses = [compute_verified_loss(blocks.drafter, each, blocks.scored, REPORT) for each in (draft, changed)]
    assert losses[0] == losses[1]
    every = replace(REPORT, positions=VerifiedPositions.all)
    losses = [compute_verified_loss(blocks.drafter, each, blocks.scored, every) for each in (draft, changed)]
    assert losses[0].item() != pytest.approx(losses[1].item(), rel=1e-3)


def test_a_softmax_on_the_support_is_the_whole_one_renormalised(blocks: Blocks) -> None:
    for size in (1, 2, 5):
        restricted = restrict_to_likely(blocks.drafter, blocks.verifier, size)
        tops = [logits.topk(size).indices for logits in (blocks.drafter, blocks.verifier)]
        union = torch.zeros_like(blocks.drafter, dtype=torch.bool)
        for top in tops:
            union.scatter_(-1, top, True)
        for logits, chosen in zip((blocks.drafter, blocks.verifier), restricted, strict=True):
            expected = logits.softmax(-1) * union
            expected /= expected.sum(-1, keepdim=True)
            found = chosen.softmax(-1).sort(-1, descending=True).values
            count = min(found.shape[-1], VOCAB)
            assert torch.allclose(found[..., :count], expected.sort(-1, descending=True).values[..., :count])
            assert not found[..., count:].any()
    assert restrict_to_likely(blocks.drafter, blocks.verifier, VOCAB)[0] is blocks.drafter


def test_half_precision_is_computed_in_fp32_and_the_forbidden_mask_token_stays_finite(blocks: Blocks) -> None:
    drafter, verifier = blocks.drafter.bfloat16(), blocks.verifier.bfloat16()
    for logits in (drafter, verifier):
        logits[..., 0] = torch.finfo(torch.bfloat16).min / 2
    for support in (3, None):
        config = replace(REPORT, support=support)
        losses = []
        for dtype in (torch.bfloat16, torch.float64):
            q, p = drafter.to(dtype).requires_grad_(), verifier.to(dtype)
            drafts = draw_drafts(q.detach(), blocks.draws, config)
            loss = compute_verified_loss(q, VerifiedDraft(drafts, drafts, p), blocks.scored, config)
            assert torch.isfinite(torch.autograd.grad(loss, q)[0]).all()
            assert not (drafts == 0).any()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_acceptance_is_counted_in_the_text_whatever_the_loss(blocks: Blocks) -> None:
    targets = torch.zeros(BLOCKS, POSITIONS, dtype=torch.int64)
    text = torch.flip(blocks.verifier, [1])
    scores = [
        score_drafts(blocks.drafter, text, targets, blocks.scored, DraftObjectiveConfig(loss), verify(blocks, REPORT))
        for loss in (DraftLoss.verified, DraftLoss.argmax)
    ]
    assert torch.equal(scores[0].accepted_greedy, scores[1].accepted_greedy)
    assert torch.equal(scores[0].accepted_sampled, scores[1].accepted_sampled)

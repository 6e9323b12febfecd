"""Drafts that a training step verifies: in greedy text without another pass, elsewhere as the shipped forward would."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema.drafter import AdapterConfig, DraftLoss, DraftObjectiveConfig, VerifiedDraftConfig, VerifiedPositions
from lora.drafter.adapter import attach_new_adapter
from lora.drafter.batches import DraftBatch, build_draft_batch
from lora.drafter.step import DraftStep, needs_verification
from lora.drafter.verified_objective import VerifiedDraft, compute_verified_loss, draw_drafts, find_active
from lora.examples.example_set import Example
from model.hf.decoding import decode_ar
from model.hf.options import AR, DecodeOptions
from tests.helpers.tiny_exports import make_repetitive_model

BLOCK, NUM_BLOCKS = 8, 7
# Cool drafts of a model that repeats itself and an adapter that disturbs it: some are accepted, some are not.
VERIFIED = VerifiedDraftConfig(sampled_share=0.6, draft_temperature=0.5, support=20)


def make_step(*, is_greedy_text: bool, config: VerifiedDraftConfig = VERIFIED) -> DraftStep:
    model = make_repetitive_model()
    adapted = attach_new_adapter(model, AdapterConfig(rank=4, alpha=16.0), seed=3).to(torch.float64)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.35)
    objective = DraftObjectiveConfig(DraftLoss.verified, verified=config)
    return DraftStep(adapted, objective, model.config.mask_token_id, 3, is_greedy_text=is_greedy_text)


def build_batch(sequences: list[np.ndarray], num_prompt: int) -> DraftBatch:
    examples = [Example(tokens, np.arange(len(tokens)) >= num_prompt) for tokens in sequences]
    return build_draft_batch(examples, range(len(examples)), blocks=NUM_BLOCKS, block_size=BLOCK, seed=0)


@pytest.fixture(scope="module")
def given() -> DraftBatch:
    """Build a batch of text that the model would not have written."""
    generator = np.random.default_rng(0)
    return build_batch([generator.integers(12, 99, length) for length in (60, 41)], num_prompt=3)


@pytest.fixture(scope="module")
def greedy() -> DraftBatch:
    """Build a batch of the model's own greedy responses."""
    model = make_repetitive_model().double()
    prompts = torch.from_numpy(np.random.default_rng(1).integers(12, 99, (3, 9)))
    result = decode_ar(model, prompts, DecodeOptions(max_new_tokens=40, eos_token_id=()).for_mode(AR))
    return build_batch(list(result.output_ids.numpy()), num_prompt=9)


def run(step: DraftStep, batch: DraftBatch) -> tuple[float, Tensor, int]:
    """Return loss, the adapter's gradient, and how often the first layer ran."""
    calls: list[Any] = []
    handle = step.base.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, sums = step(batch)
    handle.remove()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None])
    return sums[0].item(), gradient, len(calls)


def compute_judged(step: DraftStep, batch: DraftBatch) -> tuple[Tensor, VerifiedDraft]:
    """Return draft logits [B * K, D, V] and verified drafts, by the shipped forward, block by block."""
    base, width = step.base, BLOCK - 1
    all_logits, all_drafts, all_verifier = [], [], []
    for sequence, block in np.ndindex(*batch.anchors.shape):
        anchor = int(batch.anchors[sequence, block])
        prefix, seed = batch.tokens[sequence, :anchor][None], batch.tokens[sequence, anchor][None, None]
        with torch.no_grad(), step.model.disable_adapter():
            cache = base(prefix, use_cache=True).past_key_values
        masks = torch.full((1, width), base.config.mask_token_id)
        with torch.no_grad():
            block_tokens = torch.cat([seed, masks], dim=1)
            logits = base(block_tokens, past_key_values=cache, bidirectional=True, commit=False).logits[:, 1:]
        logits[..., base.config.mask_token_id] = torch.finfo(torch.float64).min / 2
        draft = draw_drafts(logits, batch.draws[sequence, block][None], step.scorer.objective.verified)
        with torch.no_grad(), step.model.disable_adapter():
            verifier = base(torch.cat([seed, draft], dim=1), past_key_values=cache, commit=False).logits[:, :-1]
        verifier[..., base.config.mask_token_id] = torch.finfo(torch.float64).min / 2
        all_logits.append(logits)
        all_drafts.append(draft)
        all_verifier.append(verifier)
    drafts = torch.cat(all_drafts)
    return torch.cat(all_logits), VerifiedDraft(drafts, drafts, torch.cat(all_verifier))


def test_greedy_text_needs_no_second_verification(greedy: DraftBatch) -> None:
    from_text = run(make_step(is_greedy_text=True), greedy)
    verified = run(make_step(is_greedy_text=False), greedy)
    assert (from_text[2], verified[2]) == (2, 3)  # clean pass, drafted blocks, and the verification of drafts
    assert from_text[0] == pytest.approx(verified[0], rel=1e-9)
    assert torch.allclose(from_text[1], verified[1], rtol=1e-7, atol=1e-12)
    assert verified[1].abs().max() > 1e-3
    # The comparison says something: drafts were accepted, and rejected, in the middle of blocks.
    step = make_step(is_greedy_text=False)
    judged = compute_judged(step, greedy)[1]
    counts = find_active(judged, greedy.scored.flatten(0, 1)).sum(-1)
    assert ((counts > 1) & (counts < BLOCK - 1)).sum() >= 3


def test_text_that_is_not_the_models_own_would_be_judged_wrongly_without(given: DraftBatch) -> None:
    from_text, verified = (run(make_step(is_greedy_text=is_greedy), given)[0] for is_greedy in (True, False))
    assert from_text != pytest.approx(verified, rel=1e-3)


@pytest.mark.parametrize("positions", VerifiedPositions)
def test_drafts_are_verified_as_the_shipped_forward_would(given: DraftBatch, positions: VerifiedPositions) -> None:
    config = VerifiedDraftConfig(sampled_share=0.6, draft_temperature=0.5, support=20, positions=positions)
    step = make_step(is_greedy_text=False, config=config)
    loss = run(step, given)[0]
    logits, judged = compute_judged(step, given)
    expected = compute_verified_loss(logits, judged, given.scored.flatten(0, 1), config)
    assert loss == pytest.approx(expected.item(), rel=1e-9)


def test_only_what_the_text_cannot_say_is_verified() -> None:
    report, every = (
        DraftObjectiveConfig(DraftLoss.verified, verified=VerifiedDraftConfig(positions=positions))
        for positions in (VerifiedPositions.active, VerifiedPositions.all)
    )
    assert not needs_verification(report, is_greedy_text=True)
    assert needs_verification(report, is_greedy_text=False)
    assert needs_verification(every, is_greedy_text=True)
    assert not needs_verification(DraftObjectiveConfig(DraftLoss.argmax), is_greedy_text=False)


def test_the_gradient_of_verified_drafts_equals_finite_differences_and_not_the_chunks(given: DraftBatch) -> None:
    # No share of the matching term and no accepted position changes with so small a shift.
    config = VerifiedDraftConfig(matching_rate=0.0, support=20)
    gradients = []
    for chunk_blocks in (1, 100):
        step = make_step(is_greedy_text=False, config=config)
        step.scorer._chunk_blocks = chunk_blocks
        gradients.append(run(step, given)[1])
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    parameter = next(p for name, p in step.named_parameters() if "layers.0" in name and "lora_B" in name)
    assert parameter.grad is not None
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            parameter[3, 1] += shift
            values.append(step(given)[1][0].item())
            parameter[3, 1] -= shift
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(parameter.grad[3, 1].item(), rel=1e-4)


def test_recomputing_layers_leaves_verified_drafts_as_they_are(given: DraftBatch) -> None:
    results = []
    for recomputes in (False, True):
        step = make_step(is_greedy_text=False)
        if recomputes:
            step.base.gradient_checkpointing_enable()
        results.append(run(step, given))
    assert results[0][0] == results[1][0]
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-9, atol=1e-12)

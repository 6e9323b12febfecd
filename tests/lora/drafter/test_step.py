"""One training forward against the shipped decoder: the same drafts and acceptances; gradients only in the adapter."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema.drafter import AdapterConfig, DraftLoss, DraftObjectiveConfig
from lora.drafter.adapter import attach_new_adapter
from lora.drafter.batches import DraftBatch, build_draft_batch
from lora.drafter.blocks import gather_targets
from lora.drafter.objective import score_drafts
from lora.drafter.step import DraftStep
from lora.examples.example_set import Example
from model.hf.speculation import real_context_acceptance
from tests.helpers.tiny_exports import make_tiny_model

BLOCK = 8


def make_step(dtype: torch.dtype = torch.float64, chunk_blocks: int = 3, **changes: Any) -> DraftStep:
    """Build a step with an adapter that is not zero."""
    model = make_tiny_model(**changes)
    adapted = attach_new_adapter(model, AdapterConfig(rank=4, alpha=16.0), seed=3).to(dtype)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    return DraftStep(adapted, DraftObjectiveConfig(), model.config.mask_token_id, chunk_blocks)


def make_batch() -> DraftBatch:
    """Build two sequences of 60 and 41 tokens, past the length at which queries are scaled."""
    generator = np.random.default_rng(0)
    examples = [Example(generator.integers(12, 99, length), np.arange(length) > 2) for length in (60, 41)]
    return build_draft_batch(examples, [0, 1], blocks=7, block_size=BLOCK, seed=0)


@pytest.fixture(scope="module")
def batch() -> DraftBatch:
    return make_batch()


def choose_block(batch: DraftBatch, sequence: int, block: int) -> DraftBatch:
    """Return one block of a batch as a batch of its own."""
    one = slice(sequence, sequence + 1), slice(block, block + 1)
    return DraftBatch(batch.tokens[one[0]], 0, batch.anchors[one], batch.scored[one], batch.draws[one])


def test_acceptance_is_that_of_the_decoder_from_the_same_prefixes(batch: DraftBatch) -> None:
    step = make_step()
    base = step.base
    accepted = []
    for sequence, block in batch.scored.all(-1).nonzero().tolist():  # the decoder always drafts a whole block
        one = choose_block(batch, sequence, block)
        with torch.no_grad():
            ours = int(step(one)[1][2])
        prefix = batch.tokens[sequence, : int(batch.anchors[sequence, block]) + 1]
        accepted.append((ours, int(real_context_acceptance(base, prefix[None], BLOCK)) - 1))
    # The decoder's verifier reads the draft, ours the true text: the first position is judged alike.
    assert len(accepted) > 5
    assert all(min(ours, 1) == min(decoded, 1) for ours, decoded in accepted)


def compute_logits(step: DraftStep, batch: DraftBatch) -> tuple[Tensor, Tensor]:
    """Return (draft, teacher) logits [B, K, D, vocab] by the shipped forward, block by block."""
    base, width = step.base, batch.scored.shape[2]
    draft = torch.zeros(*batch.scored.shape, base.config.vocab_size, dtype=torch.float64)
    teacher = torch.zeros_like(draft)
    for sequence, block in batch.scored[..., 0].nonzero().tolist():
        anchor = int(batch.anchors[sequence, block])
        tokens = batch.tokens[sequence : sequence + 1]
        with torch.no_grad(), step.model.disable_adapter():
            clean = base(tokens, use_cache=True)
            cache = clean.past_key_values
            cache.crop(anchor)
            logits_after = clean.logits[0, anchor : anchor + width]
            teacher[sequence, block, : len(logits_after)] = logits_after
        masks = torch.full((1, width), base.config.mask_token_id)
        drafted = torch.cat([tokens[:, anchor : anchor + 1], masks], dim=1)
        with torch.no_grad():
            logits_after = base(drafted, past_key_values=cache, bidirectional=True, commit=False).logits[0, 1:]
        draft[sequence, block] = logits_after
    for logits in (draft, teacher):
        logits[..., base.config.mask_token_id] = torch.finfo(torch.float64).min / 2
    return draft, teacher


@pytest.mark.parametrize("loss", [DraftLoss.argmax, DraftLoss.kl, DraftLoss.expected_length])
def test_one_forward_over_all_blocks_equals_the_shipped_forward_block_by_block(
    batch: DraftBatch, loss: DraftLoss
) -> None:
    step = make_step()
    step.scorer.objective = DraftObjectiveConfig(loss)
    total, sums = step(batch)
    draft, teacher = compute_logits(step, batch)
    flat = (draft.flatten(0, 1), teacher.flatten(0, 1), gather_targets(batch).flatten(0, 1), batch.scored.flatten(0, 1))
    score = score_drafts(*flat, DraftObjectiveConfig(loss))
    assert sums[0].item() == pytest.approx(score.loss.item(), rel=1e-9)
    assert total.item() == pytest.approx(score.loss.item(), rel=1e-6)
    assert sums[1:3].tolist() == [batch.num_blocks, score.accepted_greedy.sum()]
    assert sums[3].item() == pytest.approx(score.accepted_sampled.sum().item(), rel=1e-9)


def test_the_gradient_does_not_depend_on_the_chunks_and_equals_finite_differences(batch: DraftBatch) -> None:
    gradients = []
    for chunk_blocks in (1, 4, 100):
        step = make_step(chunk_blocks=chunk_blocks)
        step(batch)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-9, atol=1e-12)
    step = make_step()
    step.scorer.objective = DraftObjectiveConfig(DraftLoss.expected_length)  # no constants of a step in it
    step(batch)[0].backward()
    parameter = next(p for name, p in step.named_parameters() if "layers.0" in name and "lora_B" in name)
    assert parameter.grad is not None
    expected = parameter.grad[3, 1].item()
    values = []
    for shift in (1e-5, -1e-5):
        with torch.no_grad():
            parameter[3, 1] += shift
            values.append(step(batch)[1][0].item())
            parameter[3, 1] -= shift
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(expected, rel=1e-4)


def test_only_the_adapter_gets_gradients_and_the_clean_pass_runs_without_it(batch: DraftBatch) -> None:
    step = make_step()
    step(batch)[0].backward()
    with_gradient = {name for name, parameter in step.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in step.named_parameters() if ".lora_" in name}
    before = step(batch)[1]
    for name, parameter in step.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    # The verifier did not change with the adapter; the drafts did.
    assert not torch.allclose(step(batch)[1][2:], before[2:])


def test_recomputing_layers_happens_and_changes_nothing(batch: DraftBatch) -> None:
    losses, calls = [], []
    for recomputes in (False, True):
        step = make_step()
        if recomputes:
            step.base.gradient_checkpointing_enable()
        step.base.encoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(recomputes))  # noqa: B023
        loss, _ = step(batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None])
        losses.append((loss.item(), gradient))
    assert losses[0][0] == losses[1][0]
    assert torch.allclose(losses[0][1], losses[1][1], rtol=1e-9, atol=1e-12)
    assert (calls.count(False), calls.count(True)) == (2, 3)  # clean pass, drafted blocks; those once more


def test_an_optimizer_step_leaves_the_model_bit_identical(batch: DraftBatch) -> None:
    step = make_step()
    frozen = {name: value.clone() for name, value in step.state_dict().items() if ".lora_" not in name}
    adapter = {name: value.clone() for name, value in step.state_dict().items() if ".lora_" in name}
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=0.1)
    step(batch)[0].backward()
    optimizer.step()
    after = step.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any(torch.equal(after[name], value) for name, value in adapter.items())


def test_the_mask_token_is_never_what_is_drafted_or_wanted(batch: DraftBatch) -> None:
    step = make_step()
    logits = step.scorer.project(torch.randn(3, 5, 24, dtype=torch.float64))
    assert (logits.softmax(-1)[..., step.base.config.mask_token_id] == 0).all()
    assert torch.isfinite(logits).all()

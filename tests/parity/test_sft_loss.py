"""The loss of instruct tuning against transformers' Ministral 3 under a mask written down pair by pair.

Chats are packed with padding, block padding and several turns. Nothing of ours takes part in the reference but the
batch and the drawn noise: mask, positions, targets, weights and logits are restated here.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Ministral3ForCausalLM

from conf.schema import AttentionBackend, Objective, StageConfig
from data_pipeline.batch import Batch
from data_pipeline.noise import NoiseSource, NoisyBatch, add_noise
from data_pipeline.packing.form import SequenceForm
from model.attention.plan import PlanBuilder
from model.megatron.tri_mode import TriModeModel
from pretrain.objective.losses import weigh
from pretrain.objective.scoring import StepCounts
from pretrain.run.process_group import Ranks
from tests.helpers.objective import ObjectiveInput, apply_objective
from tests.helpers.packed import pack_chats
from tests.helpers.tiny_checkpoints import make_ministral3_vlm, tiny_model_config
from tests.parity.test_import import build_imported

BLOCK, LENGTH, MASK = 8, 96, 100
# Lengths of [prompt, response, ...]: two sequences of packed chats, one of several turns.
CHATS = [[[10, 13], [5, 8, 3, 9]], [[17, 30], [1, 1], [4, 6]]]
MODEL = tiny_model_config()
STAGES = {objective: StageConfig("sft", objective, block_size=BLOCK) for objective in Objective}


@dataclass(frozen=True)
class Models:
    """The same weights in transformers' class and in ours."""

    theirs: Ministral3ForCausalLM
    ours: TriModeModel


@pytest.fixture(scope="module")
def models(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Models:
    directory: Path = tmp_path_factory.mktemp("ministral3")
    theirs: Any = make_ministral3_vlm(directory, dtype=torch.float32, spelling="text", tied=False).eval()
    return Models(theirs, build_imported(directory, MODEL))


@pytest.fixture(scope="module")
def noisy() -> NoisyBatch:
    return add_noise(make_batch(CHATS), NoiseSource(1, "sft", "train", 1e-3), MASK)


def make_batch(chats: list[list[list[int]]], length: int = LENGTH) -> Batch:
    return pack_chats(chats, SequenceForm(length, BLOCK, BLOCK), MODEL.vocab_size)


def build_input(noisy: NoisyBatch, objective: Objective) -> ObjectiveInput:
    return apply_objective(noisy, objective)


def compute_ours(models: Models, item: ObjectiveInput, totals: StepCounts, objective: Objective) -> Tensor:
    """Return our loss of one microbatch as a share of the step whose counts are `totals`."""
    device = next(models.ours.parameters()).device
    plans = PlanBuilder(MODEL, AttentionBackend.auto, torch.float32, device)
    scored = weigh(item.scored, totals, STAGES[objective]).to(device)
    return models.ours(item.tokens.to(device), plans.build(item.layout, item.doubled), scored)[0]


def sees(batch: Batch, row: int, query: int, key: int) -> bool:
    """Return whether position `query` of the doubled sequence [noisy | clean] sees position `key`."""
    length = batch.tokens.shape[1]
    query_noisy, key_noisy = query < length, key < length
    q, k = query % length, key % length
    document, block = batch.document_ids[row], batch.block_ids[row]
    if query == key:
        return True
    if document[q] != document[k] or document[q] < 0:
        return False
    if not key_noisy and batch.block_padding[row, k]:
        return False
    if query_noisy and key_noisy:
        return bool(block[q] == block[k])
    if query_noisy:
        return bool(block[k] < block[q])
    return not key_noisy and k <= q


def compute_reference(
    theirs: Ministral3ForCausalLM, noisy: NoisyBatch, loss_mask: Tensor, stage: StageConfig
) -> tuple[Tensor, Tensor]:
    """Return (loss of the joint objective, logits [B, 2S, V]) through transformers."""
    batch = noisy.batch
    size, length = batch.tokens.shape
    mask = torch.tensor(
        [[[sees(batch, b, q, k) for k in range(2 * length)] for q in range(2 * length)] for b in range(size)]
    )
    bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[:, None]
    logits = theirs(
        input_ids=torch.cat([noisy.noisy_tokens, batch.tokens], dim=1),
        attention_mask=bias,
        position_ids=torch.cat([batch.position_ids, batch.position_ids], dim=1),
        use_cache=False,
    ).logits
    diffusion, ar, num_masked, num_clean = 0.0, 0.0, 0, 0
    for b, s in itertools.product(range(size), range(length)):
        token, document = batch.tokens[b, s], batch.document_ids[b, s]
        if not loss_mask[b, s]:
            continue
        if noisy.masked[b, s]:
            diffusion += cross_entropy(logits[b, s], token) / noisy.p_mask[b, s]
            num_masked += 1
        before = [k for k in range(s) if batch.document_ids[b, k] == document >= 0 and not batch.block_padding[b, k]]
        if before and not batch.block_padding[b, s]:
            ar += cross_entropy(logits[b, length + before[-1]], token)
            num_clean += 1
    return (stage.diffusion_weight * diffusion + ar) / (num_masked + num_clean), logits  # type: ignore[return-value]


def test_the_loss_is_the_one_transformers_logits_give(models: Models, noisy: NoisyBatch) -> None:
    item = build_input(noisy, Objective.joint)
    ours = compute_ours(models, item, item.counts, Objective.joint)
    with torch.no_grad():
        theirs, _ = compute_reference(models.theirs, noisy, noisy.batch.loss_mask, STAGES[Objective.joint])
        shifted, _ = compute_reference(models.theirs, noisy, noisy.batch.loss_mask.roll(1, 1), STAGES[Objective.joint])
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert ours.item() != pytest.approx(shifted.item(), rel=1e-3), "a loss mask one position off must show"


def test_unscored_positions_get_no_gradient_at_all(models: Models, noisy: NoisyBatch) -> None:
    """They end at the last layer's attention; at scored positions the gradient is what transformers' logits give."""
    item = build_input(noisy, Objective.joint)
    hidden: list[Tensor] = []
    last_norm: Any = models.ours.decoder.final_layernorm
    hook = last_norm.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), hidden.append(output))[0]
    )
    compute_ours(models, item, item.counts, Objective.joint).backward()
    hook.remove()
    grad = hidden[0].grad
    assert grad is not None
    positions = item.scored.positions
    scored, padding = grad.flatten(0, 1).tensor_split([len(positions)])
    assert len(grad) < item.tokens.numel() / 2
    assert not padding.any()
    is_scored = torch.zeros(item.tokens.numel(), dtype=torch.bool)
    is_scored[positions] = True

    loss, logits = compute_reference(models.theirs, noisy, noisy.batch.loss_mask, STAGES[Objective.joint])
    [grad_logits] = torch.autograd.grad(loss, logits)
    expected = (grad_logits @ models.theirs.lm_head.weight).transpose(0, 1).flatten(0, 1)
    assert not grad_logits.transpose(0, 1).flatten(0, 1)[~is_scored].any()
    torch.testing.assert_close(scored, expected[positions], rtol=1e-4, atol=1e-6)


def test_noise_spares_prompts_and_padding(noisy: NoisyBatch) -> None:
    batch = noisy.batch
    is_response = batch.loss_mask | batch.block_padding
    assert noisy.masked[is_response].any()
    assert not noisy.masked[~is_response].any()
    assert torch.equal(noisy.noisy_tokens[~is_response], batch.tokens[~is_response])


@pytest.mark.parametrize("objective", Objective)
def test_packed_chats_are_the_sum_of_chats_alone(models: Models, noisy: NoisyBatch, objective: Objective) -> None:
    """Loss, counts and every gradient, with the same noise."""
    assert_packed_is_the_sum(models, noisy, objective, tolerance=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("objective", Objective)
def test_packed_chats_are_the_sum_of_chats_alone_under_flex_attention(
    models: Models, noisy: NoisyBatch, objective: Objective
) -> None:
    models.ours.cuda()
    try:
        assert_packed_is_the_sum(models, noisy, objective, tolerance=1e-3)
    finally:
        models.ours.cpu()


def assert_packed_is_the_sum(models: Models, noisy: NoisyBatch, objective: Objective, tolerance: float) -> None:
    packed = build_input(noisy, objective)
    alone = [
        build_input(take_document(noisy, row, document), objective)
        for row, chats in enumerate(CHATS)
        for document in range(len(chats))
    ]
    summed = sum((item.counts for item in alone), start=StepCounts())
    absent = {"padding": 0, "computed_positions": 0}
    assert replace(summed, **absent) == replace(packed.counts, **absent)
    loss, grads = loss_and_gradients(models, [packed], packed.counts, objective)
    loss_alone, grads_alone = loss_and_gradients(models, alone, packed.counts, objective)
    assert loss_alone == pytest.approx(loss, rel=tolerance)
    for name, grad in grads.items():
        smallest = tolerance * grad.abs().max().item()
        torch.testing.assert_close(grads_alone[name], grad, rtol=tolerance, atol=smallest, msg=name)


def take_document(noisy: NoisyBatch, row: int, document: int) -> NoisyBatch:
    """Return a sequence that holds one chat of a packed one, laid out anew, with the same tokens and the same noise."""
    batch = noisy.batch
    alone = make_batch([[CHATS[row][document]]])
    theirs = (batch.document_ids[row] == document).nonzero().flatten()
    mine = (alone.document_ids[0] == 0).nonzero().flatten()
    assert torch.equal(batch.position_ids[row, theirs], alone.position_ids[0, mine])
    masked, p_mask = torch.zeros_like(alone.loss_mask), torch.ones(alone.tokens.shape)
    alone.tokens[0, mine] = batch.tokens[row, theirs]
    masked[0, mine], p_mask[0, mine] = noisy.masked[row, theirs], noisy.p_mask[row, theirs]
    return NoisyBatch(alone, torch.where(masked, MASK, alone.tokens), masked, p_mask)


def loss_and_gradients(
    models: Models, items: list[ObjectiveInput], totals: StepCounts, objective: Objective
) -> tuple[float, dict[str, Tensor]]:
    models.ours.zero_grad()
    loss = torch.stack([compute_ours(models, item, totals, objective) for item in items]).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in models.ours.named_parameters() if p.grad is not None}

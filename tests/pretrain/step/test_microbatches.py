"""A forward of live noisy blocks has the losses and gradients of the whole doubled one, in float64."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import (
    AttentionBackend,
    Device,
    Dtype,
    Objective,
    ParallelConfig,
    PrecisionConfig,
    Recompute,
    RuntimeConfig,
    StageConfig,
)
from data_pipeline.batch import Batch
from data_pipeline.noise import NoiseSource
from data_pipeline.packing.form import SequenceForm
from model.attention.plan import PlanBuilder
from model.megatron.build import build_model_chunks
from model.megatron.initialise import initialise_weights
from pretrain.objective.losses import compute_loss_sums
from pretrain.run.model_parallel import distributed_session
from pretrain.step.microbatches import MicrobatchBuilder, PreparedStep
from tests.helpers.packed import pack_chats
from tests.helpers.small_joint import MODEL

LENGTH, MASK = 512, 100
CPU = torch.device("cpu")
# Texts; chats of several turns; both packed. The number of the sample decides how much noise there is.
SEQUENCES = {
    "text": [[[512]], [[512]]],
    "packed": [[[100], [30], [60, 20]], [[9], [128], [3, 60]]],
    "chats": [[[60, 30, 120, 10]], [[100, 40], [50, 20]]],
}
BLOCK_SIZES = (4, 16, 32, 128)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with distributed_session(ParallelConfig(), RuntimeConfig(device=Device.cpu), seed=0):
        yield


@pytest.fixture(scope="module")
def model(groups: None) -> Any:
    return build_model(Recompute.none)


def build_model(recompute: Recompute) -> Any:
    """Build the model in float64."""
    precision = PrecisionConfig(Dtype.fp32)
    (chunk,) = build_model_chunks(MODEL, ParallelConfig(recompute=recompute), precision, loss_chunk_rows=64)
    initialise_weights([chunk], MODEL, seed=0)
    return chunk.double()


def build_builder(block_size: int, noisy_lengths: tuple[int, ...]) -> MicrobatchBuilder:
    plans = PlanBuilder(MODEL, AttentionBackend.cpu, torch.float64, CPU)
    stage = StageConfig("sft", Objective.joint, block_size=block_size)
    return MicrobatchBuilder(stage, NoiseSource(1, "sft", "train", 1e-3), MASK, plans, noisy_lengths)


def build_batch(kind: str, block_size: int, sample: int) -> Batch:
    batch = pack_chats(SEQUENCES[kind], SequenceForm(LENGTH, block_size, block_size), MODEL.vocab_size)
    return replace(batch, sample_indices=batch.sample_indices + sample)


def run(model: Any, step: PreparedStep) -> tuple[Tensor, list[Tensor]]:
    """Return the loss sums and the gradients of a step."""
    sums = torch.zeros(5, dtype=torch.float64)
    model.zero_grad()
    for microbatch in step.microbatches:
        loss, losses = model(microbatch.tokens, microbatch.plan, microbatch.scored)
        loss.backward()
        sums += compute_loss_sums(loss, losses, microbatch.scored)
    return sums, [weight.grad.clone() for weight in model.parameters()]


def assert_same(model: Any, block_size: int, batches: list[Batch]) -> list[int]:
    """Compare a step of live blocks with the whole one; return the noisy positions of each microbatch."""
    lengths = tuple(range(LENGTH // 8, LENGTH + 1, LENGTH // 8))
    live, whole = (build_builder(block_size, some).prepare(batches) for some in (lengths, lengths[-1:]))
    same = replace(whole.counts, computed_positions=live.counts.computed_positions)
    assert same == live.counts
    (sums, gradients), (whole_sums, whole_gradients) = run(model, live), run(model, whole)
    torch.testing.assert_close(sums, whole_sums, rtol=1e-12, atol=0)
    for mine, its in zip(gradients, whole_gradients, strict=True):
        assert (mine - its).norm() <= 1e-12 * its.norm()
    return [microbatch.tokens.shape[1] - LENGTH for microbatch in live.microbatches]


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", SEQUENCES)
def test_losses_and_gradients_are_those_of_the_whole_forward(model: Any, kind: str, block_size: int) -> None:
    batches = [build_batch(kind, block_size, sample) for sample in (0, 2, 4)]
    computed = assert_same(model, block_size, batches)
    if (kind, block_size) in (("chats", 4), ("chats", 16), ("packed", 4), ("text", 4)):
        assert min(computed) < LENGTH


@pytest.mark.parametrize("recompute", [Recompute.elementwise, Recompute.selective, Recompute.full])
def test_recomputed_activations_have_the_same_gradients(recompute: Recompute) -> None:
    assert assert_same(build_model(recompute), 16, [build_batch("chats", 16, 0)])[0] < LENGTH


def test_a_microbatch_without_a_live_block_trains_its_autoregressive_part(model: Any) -> None:
    text, prompts = build_batch("text", 16, 0), build_batch("chats", 16, 2)
    prompts.loss_mask[:] = False
    prompts.block_padding[:] = False
    # Scored, but never masked: as if t were too small.
    unmasked = replace(text, loss_mask=text.loss_mask.clone())
    unmasked.loss_mask[:, 16:] = False
    assert assert_same(model, 16, [text, prompts, unmasked])[1] == LENGTH // 8


@pytest.mark.parametrize("kind", SEQUENCES)
def test_a_rehearsal_has_every_length_in_turn(model: Any, kind: str) -> None:
    lengths = tuple(range(LENGTH // 8, LENGTH + 1, LENGTH // 8))
    step = build_builder(16, lengths).rehearse(build_batch(kind, 16, 0), num_microbatches=10)
    computed = [microbatch.tokens.shape[1] - LENGTH for microbatch in step.microbatches]
    assert computed == [*lengths, *lengths[:2]]
    _, gradients = run(model, step)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)

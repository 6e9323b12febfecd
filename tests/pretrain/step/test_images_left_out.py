"""Images stay out of the noisy half: losses and gradients are those of the whole doubled forward, in float64."""

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
    RuntimeConfig,
    StageConfig,
    VisionConfig,
)
from data_pipeline.batch import Batch, PlacedImage
from data_pipeline.noise import NoiseSource
from data_pipeline.packing.form import SequenceForm
from model.attention.plan import PlanBuilder
from model.hf.image_tokens import list_image_tokens
from model.megatron.build import build_model_chunks
from model.megatron.initialise import initialise_weights
from pretrain.objective.losses import compute_loss_sums
from pretrain.run.model_parallel import distributed_session
from pretrain.step.images import ImageBuilder
from pretrain.step.microbatches import MicrobatchBuilder, PreparedStep
from tests.helpers.packed import pack_chats
from tests.helpers.small_joint import MODEL

LENGTH, BLOCK_SIZE, MASK = 256, 16, 100
VISION = VisionConfig(num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2)
# Chats whose prompts have room for an image of so many features, and a response; sizes of images in features.
CHATS = {0.3: ([[80, 48], [90, 28]], (6, 5)), 0.6: ([[90, 28], [90, 28]], (9, 8)), 0.9: ([[230, 16]], (14, 15))}


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with distributed_session(ParallelConfig(), RuntimeConfig(device=Device.cpu), seed=0):
        yield


@pytest.fixture(scope="module")
def model(groups: None) -> Any:
    """Build a model that reads images, in float64 throughout."""
    config = replace(MODEL, vision=VISION)
    (chunk,) = build_model_chunks(config, ParallelConfig(), PrecisionConfig(Dtype.fp32), loss_chunk_rows=64)
    initialise_weights([chunk], config, seed=0)
    chunk.vision.compute_dtype = torch.float64
    return chunk.double()


def build_batch(share: float) -> Batch:
    """Build a batch of one sequence whose prompts begin with images."""
    chats, grid = CHATS[share]
    batch = pack_chats([chats], SequenceForm(LENGTH, BLOCK_SIZE, BLOCK_SIZE), MODEL.vocab_size)
    batch.tokens[batch.tokens < 30] += 30  # no image tokens by chance
    ids = torch.tensor(list_image_tokens(grid))
    torch.manual_seed(0)
    images, stored, first = [], None, 0
    for lengths in chats:
        batch.tokens[0, first : first + len(ids)] = ids
        pixels = torch.randn(3, grid[0] * 28, grid[1] * 28)
        images.append(PlacedImage(0, first, grid, stored, pixels))  # type: ignore[arg-type]
        first += sum(-(-length // BLOCK_SIZE) * BLOCK_SIZE for length in lengths)
    return replace(batch, images=tuple(images))


def prepare(batch: Batch, noisy_lengths: tuple[int, ...]) -> PreparedStep:
    plans = PlanBuilder(MODEL, AttentionBackend.cpu, torch.float64, torch.device("cpu"))
    stage = StageConfig("vlm", Objective.joint, block_size=BLOCK_SIZE)
    images = ImageBuilder(VISION, sequence_parallel=False)
    noise = NoiseSource(1, "vlm", "train", 1e-3)
    return MicrobatchBuilder(stage, noise, MASK, plans, noisy_lengths, images=images).prepare([batch])


def run(model: Any, step: PreparedStep) -> tuple[Tensor, list[Tensor]]:
    """Return the loss sums and the gradients of a step of one microbatch."""
    (microbatch,) = step.microbatches
    model.zero_grad()
    loss, losses = model(microbatch.tokens, microbatch.plan, microbatch.scored, microbatch.images)
    loss.backward()
    return compute_loss_sums(loss, losses, microbatch.scored), [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("share", CHATS)
def test_losses_and_gradients_are_those_of_the_whole_forward(model: Any, share: float) -> None:
    batch = build_batch(share)
    lengths = tuple(range(LENGTH // 8, LENGTH + 1, LENGTH // 8))
    live, whole = prepare(batch, lengths), prepare(batch, lengths[-1:])
    assert live.microbatches[0].tokens.shape[1] < whole.microbatches[0].tokens.shape[1] == 2 * LENGTH
    # In the whole forward features stand in both halves, and nothing reads those of the noisy one.
    numbers = [len(step.microbatches[0].images.positions) for step in (live, whole)]  # type: ignore[union-attr]
    assert 2 * numbers[0] == numbers[1] > 0.7 * share * 2 * LENGTH
    (sums, gradients), (whole_sums, whole_gradients) = run(model, live), run(model, whole)
    torch.testing.assert_close(sums, whole_sums, rtol=1e-12, atol=0)
    for mine, its in zip(gradients, whole_gradients, strict=True):
        assert its.norm() > 0
        assert (mine - its).norm() <= 1e-12 * its.norm()

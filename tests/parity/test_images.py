"""The training model computes transformers' own logits and gradients of prompts with images."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.schema import AttentionBackend, Dtype, ModelConfig, ParallelConfig, PrecisionConfig
from data_pipeline.batch import Batch, PlacedImage
from model.attention.plan import PlanBuilder
from model.attention.visibility import build_regular_layout
from model.convert.hf_config import read_hf_config
from model.convert.load_weights import load_hf_weights
from model.convert.mapping import VISION_PARTS
from model.hf.image_tokens import IMAGE_START, Grid
from model.megatron.build import build_model_chunks
from model.megatron.tri_mode import TriModeModel
from pretrain.run.process_group import Ranks
from pretrain.step.images import ImageBuilder
from tests.helpers.tiny_vlm import make_mistral3, make_prompts, make_vlm

# Images first, in the middle, one after another and last; sides that are no multiple of each other.
PROMPTS: dict[str, list[int | Grid]] = {
    "one_image": [(2, 3), 30, 31, 32],
    "in_the_middle": [40, 41, (1, 2), 42, 43],
    "several": [22, (3, 1), (1, 4), 23, 24, (1, 1), 25],
    "none": [30, 31, 32, 33],
}


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, TriModeModel, Any]:
    """Return the configuration, the training model in fp32, and transformers' with the same weights."""
    exported, directory = make_vlm(torch.float32), tmp_path_factory.mktemp("vlm")
    exported.save_pretrained(directory)
    model = read_hf_config(directory).model
    [chunk] = build_model_chunks(model, ParallelConfig(), PrecisionConfig(Dtype.fp32), loss_chunk_rows=64)
    load_hf_weights([chunk], directory, model)
    return model, chunk, make_mistral3(exported)


def make_batch(ids: Tensor, images: dict[str, Tensor], grids: list[Grid]) -> Batch:
    places = (ids[0] == IMAGE_START).nonzero()[:, 0].tolist()
    pixels = [image[:, : h * 28, : w * 28] for image, (h, w) in zip(images.get("pixel_values", []), grids, strict=True)]
    stored: Any = None
    placed = [
        PlacedImage(0, first, grid, stored, image) for first, grid, image in zip(places, grids, pixels, strict=True)
    ]
    layout = build_regular_layout(ids.shape[1], ids.shape[1])
    return Batch(ids, layout, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), tuple(placed))


def compute_logits(model: ModelConfig, chunk: TriModeModel, batch: Batch) -> Tensor:
    """Return logits [B, S, V] of the AR forward."""
    assert model.vision is not None
    plans = PlanBuilder(model, AttentionBackend.cpu, torch.float32, torch.device("cpu"))
    positions = plans.shard.find_whole(batch.tokens.shape[1], doubled=False)
    images = ImageBuilder(model.vision, sequence_parallel=False).build(batch, batch.tokens, positions)
    return chunk(batch.tokens, plans.build(batch.layout, doubled=False), images=images).transpose(0, 1)


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_and_gradients_equal_transformers(saved: tuple[ModelConfig, TriModeModel, Any], name: str) -> None:
    model, chunk, theirs = saved
    [(ids, images)] = make_prompts([PROMPTS[name]]).singles
    grids = [part for part in PROMPTS[name] if isinstance(part, tuple)]
    actual: Tensor = compute_logits(model, chunk, make_batch(ids, images, grids))
    expected = theirs(input_ids=ids, **images).logits
    assert (actual - expected).abs().max() <= 1e-4
    assert expected.std() > 0.05, "logits that hardly vary would prove nothing"
    chunk.zero_grad()
    theirs.zero_grad()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {key: weight.grad for key, weight in chunk.named_parameters() if key.startswith("vision.")}
    assert len(gradients) == 2 + 2 * 9 + 4
    for key, weight in theirs.model.named_parameters():
        part = next((part for part in VISION_PARTS if key.startswith(part)), None)
        if part is not None:
            ours = gradients[VISION_PARTS[part] + key.removeprefix(part)]
            expected_grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            assert ours is not None and (ours - expected_grad).norm() <= 1e-4 * expected_grad.norm(), key

"""The vision encoder computes what transformers' tower and projector do, forward and backward, in any format."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from conf.schema import Device, ModelConfig, ParallelConfig, RuntimeConfig, VisionConfig
from model.megatron.vision import VisionEncoder
from pretrain.run.model_parallel import distributed_session

MODEL = ModelConfig("toy", 2, 64, 96, 4, 2, 32, 384, vision=VisionConfig(2, 32, 48, 2))
SIZES = [(28, 28), (56, 84), (140, 28)]


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with distributed_session(ParallelConfig(), RuntimeConfig(device=Device.cpu), seed=0):
        yield


def build(weights: torch.dtype, computes: torch.dtype) -> VisionEncoder:
    torch.manual_seed(0)
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    encoder = VisionEncoder(config, MODEL, computes)
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.1)
    return encoder.to(weights)


def draw_images(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, *size, dtype=dtype) for size in SIZES]


def compute_with_transformers(encoder: VisionEncoder, images: list[Tensor]) -> list[Tensor]:
    """Return the features of all images in one pass of transformers' own forward, padded and masked as it does."""
    height, width = (max(sides) for sides in zip(*SIZES, strict=True))
    padded = [torch.nn.functional.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
    sizes: Any = SIZES
    patches = encoder.tower(torch.stack(padded), image_sizes=sizes).last_hidden_state
    features = encoder.projector(patches[0], SIZES)
    return list(features.split([height * width // 28**2 for height, width in SIZES]))


def test_features_and_gradients_are_those_of_transformers_modules() -> None:
    encoder = build(torch.float32, torch.float32)
    images = draw_images(torch.float32)
    outputs, gradients = [], []
    for features in (encoder(images), compute_with_transformers(encoder, images)):
        encoder.zero_grad()
        sum((part * part.detach().roll(1, 0)).sum() for part in features).backward()  # type: ignore[union-attr]
        outputs.append(features)
        gradients.append({name: weight.grad.clone() for name, weight in encoder.named_parameters()})  # type: ignore[union-attr]
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name, theirs in gradients[1].items():
        assert (gradients[0][name] - theirs).norm() <= 1e-4 * theirs.norm(), name


def test_weights_in_bf16_are_computed_with_in_fp32() -> None:
    stored, exact = build(torch.bfloat16, torch.float32), build(torch.float32, torch.float32)
    exact.load_state_dict(stored.state_dict())
    features = stored(draw_images(torch.float32))
    for ours, theirs in zip(features, exact(draw_images(torch.float32)), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.float32
    features[0].sum().backward()
    features[1].sum().backward()
    assert {weight.grad.dtype for weight in stored.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]


def test_bf16_throughout_is_coarser() -> None:
    exact, coarse = build(torch.bfloat16, torch.float32), build(torch.bfloat16, torch.bfloat16)
    images = draw_images(torch.float32)[1:2]
    error = (coarse(images)[0].float() - exact(images)[0]).norm() / exact(images)[0].norm()
    assert 1e-4 < error < 0.1


def test_small_images_of_one_size_go_together_and_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build(torch.float32, torch.float32)
    sizes = [(28, 28), (56, 84), (28, 28), (28, 28), (56, 84)]
    monkeypatch.setattr("model.megatron.vision.PATCHES_TOGETHER", 8)
    assert encoder.group_images(sizes) == [[0, 2], [1], [3], [4]]
    images = [torch.randn(3, *size) for size in sizes]
    for ours, image in zip(encoder(images), images, strict=True):
        torch.testing.assert_close(ours, encoder([image])[0])

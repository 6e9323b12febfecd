"""Estimate what the vision tower and its projector take on a rank of the first pipeline stage.

W width, D head_dim and F inner width of the tower, H hidden size of the decoder, e bytes per element of what the tower
computes in. It saves the inputs of its layers and computes a layer of one image anew in the backward
(model/megatron/vision.py). Per patch:

    saved       W e of each layer's input and the last one's output, H e / 4 of features (of a patch's share in one)
    recomputed  (9 W + 6 F) e of a layer, with the gradients that exist then; in bf16 3 W e more

Small images go through together. With several such groups the gradients of all weights wait until the last group has
added its own. A group saves 2 D e of rotation for each patch of an image.
Tested against live tensors (tests/launch/plan/test_memory.py). Pixels are left out, as are tokens.
"""

from conf.schema import VisionConfig
from launch.plan.rank_shape import FP32, RankShape

PATCHES_TOGETHER = 4096  # model/megatron/vision.py


def list_vision_parameters(vision: VisionConfig, hidden_size: int) -> list[int]:
    """Return the elements of each parameter of tower and projector, in the order of the model."""
    width, inner = vision.hidden_size, vision.ffn_hidden_size
    layer = [width, *[inner * width] * 3, *[width * width] * 4, width]
    projector = [width, width * vision.merged_width, hidden_size * width, hidden_size * hidden_size]
    return [width * vision.patch_width, width, *layer * vision.num_layers, *projector]


def saved_by_tower(shape: RankShape) -> int:
    """Return the bytes that the tower saves of one microbatch."""
    return _count_groups(shape) * _saved_of_rotation(shape) + _count_images(shape) * _saved_of_image(shape)


def tower_backward(shape: RankShape) -> int:
    """Return the most bytes in use, beyond what is saved, during the backward of a layer of the tower."""
    vision, num_groups, itemsize = shape.model.vision, _count_groups(shape), shape.vision.num_bytes
    if vision is None or not num_groups:
        return 0
    patches = _patches_of_image(shape) * min(_images_together(shape), _count_images(shape))
    copies = 3 * vision.hidden_size if itemsize < FP32 else 0
    widths = 9 * vision.hidden_size + 6 * vision.ffn_hidden_size + copies
    weights = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.ffn_hidden_size
    of_layer = (patches * widths + (weights if itemsize != shape.element_bytes else 0)) * itemsize
    gradients = shape.model.num_vision_parameters * shape.element_bytes if num_groups > 1 else 0
    return of_layer + max(0, gradients - _images_together(shape) * _saved_of_image(shape))


def _saved_of_image(shape: RankShape) -> int:
    vision = shape.model.vision
    if vision is None:
        return 0
    features = shape.model.hidden_size // vision.merge_size**2
    per_patch = (vision.num_layers + 1) * vision.hidden_size + features
    return _patches_of_image(shape) * per_patch * shape.vision.num_bytes


def _saved_of_rotation(shape: RankShape) -> int:
    vision = shape.model.vision
    return 0 if vision is None else _patches_of_image(shape) * 2 * vision.head_dim * shape.vision.num_bytes


def image_gathering_bytes(shape: RankShape) -> int:
    """Return the bytes of the features of a microbatch's images."""
    return shape.num_image_features * shape.model.hidden_size * shape.element_bytes


def vision_gradient_bytes(shape: RankShape) -> int:
    """Return the bytes of the gradients of tower and projector."""
    return shape.model.num_vision_parameters * FP32


def _count_images(shape: RankShape) -> int:
    """Return the images of a microbatch that a rank computes: they are dealt to tensor and context ranks."""
    ranks = shape.parallel.tensor_parallel * shape.parallel.context_parallel
    images = -(-shape.num_image_features // shape.image_side**2)
    return -(-images // ranks)


def _images_together(shape: RankShape) -> int:
    return max(1, PATCHES_TOGETHER // _patches_of_image(shape))


def _count_groups(shape: RankShape) -> int:
    """Return the groups of images that go through the tower one after another."""
    images = _count_images(shape)
    return -(-images // _images_together(shape)) if images else 0


def _patches_of_image(shape: RankShape) -> int:
    assert shape.model.vision is not None
    return (shape.image_side * shape.model.vision.merge_size) ** 2

"""Train the parts of a model that reads images each in its own way: frozen, or with a learning rate of its own."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch import nn

from conf.schema import ModelPart, StageConfig

NAMES = {ModelPart.tower: "vision.tower.", ModelPart.projector: "vision.projector."}
# megatron-core tells the groups of parameters in a checkpoint apart by the settings of its own schedule, which we do
# not use: this one names the part.
LABEL_KEY = "max_lr"
LABELS = {ModelPart.text: 0.0, ModelPart.tower: 1.0, ModelPart.projector: 2.0}


def find_part(name: str) -> ModelPart:
    """Return the part of the model that a parameter of this name belongs to."""
    return next((part for part, text in NAMES.items() if text in name), ModelPart.text)


def freeze_parts(chunks: Sequence[nn.Module], frozen: Sequence[ModelPart]) -> None:
    """Leave these parts out of training; before data-parallel wrapping, which makes gradient buffers."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if find_part(name) in frozen:
                parameter.requires_grad_(False)


def label_parts() -> dict[Any, Any]:
    """Return megatron-core's overrides by which every part of the model has groups of parameters of its own."""
    return {_key_of(part): {LABEL_KEY: LABELS[part]} for part in NAMES}


def _key_of(part: ModelPart) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(part.value, lambda _, name: find_part(name) is part))


def scale_learning_rate(group: dict[str, Any], stage: StageConfig) -> float:
    """Return the learning rate of a group of parameters, relative to that of the text model."""
    factors = {ModelPart.text: 1.0, ModelPart.tower: stage.tower_lr, ModelPart.projector: stage.projector_lr}
    return factors[next(part for part, label in LABELS.items() if label == group[LABEL_KEY])]


def sum_vision_gradients(wrapped: Sequence[Any]) -> None:
    """Sum gradients of tower and projector over tensor-parallel ranks, each of which computed other images.

    Over data- and context-parallel ranks megatron-core sums them as all others.
    """
    group: Any = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        parameters = list(_list_vision_parameters(wrapped))
        sums: list[Any] = [dist.all_reduce(weight.main_grad, group=group, async_op=True) for weight in parameters]
        for sum_ in sums:
            sum_.wait()


def _list_vision_parameters(wrapped: Sequence[Any]) -> Iterator[Any]:
    for chunk in wrapped:
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and find_part(name) is not ModelPart.text:
                yield parameter

"""Draft adapters with random weights, as PEFT attaches them."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model


def attach_adapter(
    model: Any,
    targets: tuple[str, ...] = ("o_proj",),
    task_type: Any = None,
    std: float = 0.5,
    layers: list[int] | None = None,
) -> Any:
    """Put a random LoRA into the model, strong enough to change most argmaxes, and return the PEFT wrapper."""
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=list(targets), task_type=task_type, layers_to_transform=layers
    )
    wrapped: Any = get_peft_model(model, config).eval()
    fill_adapter(wrapped, "default", std)
    return wrapped


def fill_adapter(model: Any, adapter: str, std: float) -> None:
    """Fill the weights that PEFT begins with zeros at random."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}." in name:
            parameter.data.normal_(0, std, generator=generator)

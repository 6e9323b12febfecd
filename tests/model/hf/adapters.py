"""Draft adapters with random weights, as PEFT attaches them."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model


def attach_adapter(model: Any, targets: tuple[str, ...] = ("o_proj",), task_type: Any = None, std: float = 0.5) -> Any:
    """A random LoRA strong enough to change most argmaxes; it is in the model afterwards. Returns the PEFT wrapper."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=list(targets), task_type=task_type)
    wrapped: Any = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, std, generator=generator)
    return wrapped

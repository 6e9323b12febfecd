"""The draft adapter: attach it to a model, count its parameters, write it."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save
from torch import Tensor, nn

from conf.schema.drafter import AdapterConfig
from conf.system.atomic import atomic_directory
from model.checkpoint.checksums import write_sums
from model.export.adapter_weights import TARGET, WEIGHTS_FILE
from model.export.draft_adapter import CONFIG_FILE, RECORD_FILE
from model.hf.modeling_nemotron_labs_diffusion_vlm import TOWER_MODULES, NemotronLabsDiffusionVLMModel


def attach_new_adapter(model: nn.Module, config: AdapterConfig, seed: int) -> PeftModel:
    """Attach a new LoRA in fp32, which changes nothing yet, to every o_proj of `model`; freeze all other weights.

    A vision tower has modules of that name, too, and none of them drafts.
    """
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] (any number will do)
        target_modules=[TARGET],
        exclude_modules=TOWER_MODULES if isinstance(model, NemotronLabsDiffusionVLMModel) else None,
        lora_dropout=0.0,
        bias="none",
    )
    adapted = peft.get_peft_model(model, lora)  # type: ignore[arg-type]
    check_trainable(adapted, count_adapter_parameters(model.config, config.rank))  # pyright: ignore[reportArgumentType]
    return adapted


def count_adapter_parameters(config: Any, rank: int) -> int:
    """Return layers * rank * (q_width + hidden): 23.9M, 35.7M and 47.2M for 3B, 8B and 14B at rank 128."""
    q_width = config.num_attention_heads * config.head_dim
    return config.num_hidden_layers * rank * (q_width + config.hidden_size)


def check_trainable(model: nn.Module, expected: int) -> None:
    """Assert that exactly the adapter's `expected` parameters train, in fp32."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(f".self_attn.{TARGET}.lora_" in name for name in trainable), sorted(trainable)
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())
    count = sum(parameter.numel() for parameter in trainable.values())
    assert count == expected, f"{count} trainable parameters, expected {expected}"


def save_adapter(model: PeftModel, tensors: dict[str, Tensor], folder: Path, record: dict[str, Any]) -> None:
    """Write `folder` in PEFT's format; it appears complete or not at all and replaces a former one.

    tensors: the adapter's, gathered, under PEFT's names. record: content of drafter.json.
    """
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    with atomic_directory(folder, replace=True) as partial:
        config.save_pretrained(str(partial))
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        # save_file would write a file that only its owner may read.
        (partial / WEIGHTS_FILE).write_bytes(save(contiguous, {"format": "pt"}))
        (partial / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_sums(partial)  # of its own, so that the sums of the export around it stay true
    assert (folder / CONFIG_FILE).is_file()

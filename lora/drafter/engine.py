"""DeepSpeed around a DraftStep: its configuration, its optimizer, and its part of a checkpoint.

Optimizer state and weights are sharded as ZeRO shards them, so a checkpoint is continued by as many processes under the
same ZeRO level. Drafters are small enough to start over under another layout.
"""

import os
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns at import that it found no other

import deepspeed
import torch.distributed as dist
from deepspeed import ops
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from conf.schema.drafter import DrafterConfig
from conf.system.errors import UserError
from lora.drafter.step import DraftStep
from pretrain.run.step_directory import DeferredErrors

TAG = "deepspeed"  # folder of DeepSpeed's own files in a step directory
WRITE_ERRORS = (OSError, RuntimeError)  # torch.save raises RuntimeError on a full disk


def build_engine(step: DraftStep, config: DrafterConfig, device: torch.device) -> Any:
    """Build this process's engine, in an existing process group, with AdamW over the adapter."""
    if device.type == "cpu":
        # DeepSpeed would compile a kernel at start, for shared-memory all-reduces that gloo does just as well.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    trainable = [parameter for parameter in step.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=0.0,  # set before every step
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
        weight_decay=config.optimizer.weight_decay,
    )
    settings = build_deepspeed_config(config, sum(map(torch.numel, trainable)))
    engine, *_ = deepspeed.initialize(model=step, optimizer=optimizer, config=settings)
    return engine


def build_deepspeed_config(config: DrafterConfig, num_trainable: int) -> dict[str, Any]:
    """Return DeepSpeed's own configuration; without fp16 and bf16 it leaves every weight in its format.

    num_trainable: parameters, all of which fit one bucket; DeepSpeed's default would take 2 GB whatever trains.
    """
    train, zero = config.train, config.zero
    zero_optimization: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "reduce_bucket_size": num_trainable,
    }
    if zero.offload_optimizer:
        zero_optimization["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_parameters:
        zero_optimization["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": zero_optimization,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would be compiled at start
        "steps_per_print": None,
    }


def gather_adapter(engine: Any) -> dict[str, Tensor]:
    """Return the adapter's tensors on the CPU, under PEFT's names; all ranks call this together."""
    model: PeftModel = engine.module.model
    adapter = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    with deepspeed.zero.GatheredParameters(adapter, enabled=hasattr(adapter[0], "ds_id")):
        return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


class EngineFiles:
    """DeepSpeed's files of a checkpoint: adapter and optimizer. All ranks call every method together."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._errors = engine, DeferredErrors()
        # save_checkpoint has collectives after these writes: an error must not leave it early.
        for writer, name in (
            (engine.checkpoint_engine, "makedirs"),
            (engine.checkpoint_engine, "save"),
            (engine, "_copy_recovery_script"),
        ):
            setattr(writer, name, self._errors.deferring(getattr(writer, name), WRITE_ERRORS))

    def write(self, folder: Path) -> None:
        """Write this rank's files. Raises: OSError, RuntimeError if this rank failed, after the last collective."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        self._errors.raise_first()

    def load(self, step_dir: Path) -> None:
        """Continue from `step_dir`. Raises: UserError if DeepSpeed cannot read it."""
        try:
            path, _ = self._engine.load_checkpoint(str(step_dir), tag=TAG, load_module_strict=False)
        except (OSError, RuntimeError, AssertionError, KeyError, EOFError) as error:
            raise UserError(f"{step_dir} cannot be read ({error}): delete it to continue from an older one") from error
        if path is None:
            raise UserError(f"{step_dir} cannot be read: delete it to continue from an older one")

"""DeepSpeed around a DraftStep: what it is told, and checkpoints of what it holds.

Optimizer state and weights lie as ZeRO has spread them, so a checkpoint is continued by as many processes, under the
same stage; drafters are small enough to start over under another layout.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns, when it is imported, that it found no other

import deepspeed
import torch.distributed as dist
from deepspeed import ops
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from conf.schema.drafter import DrafterConfig
from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from lora.drafter.step import DraftStep
from model.checkpoint.layout import MANIFEST_NAME, begin_step, partial_directory, publish_step, step_directory
from pretrain.run.process_group import run_on_first_rank

TAG = "deepspeed"  # folder of DeepSpeed's own files in a step directory


def build_engine(step: DraftStep, config: DrafterConfig, device: torch.device) -> Any:
    """The engine of this process, in an existing process group; AdamW over the adapter alone."""
    if device.type == "cpu":
        # It would compile a kernel at start, for shared memory all-reduces that gloo does as well.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    trainable = [parameter for parameter in step.parameters() if parameter.requires_grad]
    # A learning rate is set before every step (see pretrain.schedule).
    chosen = config.optimizer
    betas = (chosen.beta1, chosen.beta2)
    optimizer = torch.optim.AdamW(trainable, lr=0.0, betas=betas, eps=chosen.epsilon, weight_decay=chosen.weight_decay)
    settings = build_deepspeed_config(config, sum(map(torch.numel, trainable)))
    engine, *_ = deepspeed.initialize(model=step, optimizer=optimizer, config=settings)
    return engine


def build_deepspeed_config(config: DrafterConfig, num_trainable: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; without fp16 and bf16 it leaves every weight in the format it has.

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
    """The adapter's tensors on the CPU, under PEFT's names; all ranks call this together."""
    model: PeftModel = engine.module.model
    adapter = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    with deepspeed.zero.GatheredParameters(adapter, enabled=hasattr(adapter[0], "ds_id")):
        return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


class EngineCheckpoints:
    """Step directories of one run: DeepSpeed's files and, last, a manifest. All ranks call every method together."""

    def __init__(self, run_dir: Path, engine: Any, keep: int) -> None:
        self._run_dir, self._engine, self._keep = run_dir, engine, keep

    def save(self, step: int, manifest: str) -> None:
        """Save under `step` and delete what is older than the newest `keep`. manifest: text of checkpoint.json.

        Raises: UserError if the disk cannot take it; nothing with a final name is left then.
        """
        final = step_directory(self._run_dir, step)
        partial = partial_directory(final)
        try:
            run_on_first_rank(lambda: begin_step(partial))
            self._engine.save_checkpoint(str(partial), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
            dist.barrier()
            run_on_first_rank(lambda: self._publish(partial, final, manifest))
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"cannot write checkpoint {final}: {error}. Earlier checkpoints are untouched; free space or mend the "
                "cause, then give the same command again."
            ) from error

    def _publish(self, partial: Path, final: Path, manifest: str) -> None:
        atomic_write_text(partial / MANIFEST_NAME, manifest)
        publish_step(partial, final, self._keep)

    def load(self, step_dir: Path) -> None:
        """Continue from `step_dir`. Raises: UserError if DeepSpeed cannot read it."""
        try:
            path, _ = self._engine.load_checkpoint(str(step_dir), tag=TAG, load_module_strict=False)
        except (OSError, RuntimeError, AssertionError, KeyError, EOFError) as error:
            raise UserError(f"{step_dir} cannot be read ({error}): delete it to continue from an older one") from error
        if path is None:
            raise UserError(f"{step_dir} cannot be read: delete it to continue from an older one")

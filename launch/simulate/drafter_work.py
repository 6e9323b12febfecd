"""Do a step of the draft adapter's training on fake tensors, and write what was recorded (launch.simulate.drafter)."""

import json
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.composition.compose import compose_size
from conf.composition.trees import DRAFTER_TREE
from conf.schema import Dtype, ModelConfig
from conf.schema.drafter import DrafterConfig
from conf.system.atomic import atomic_write_text
from launch.simulate.adaptations import adapt_to_fake_tensors
from launch.simulate.device_kind import KINDS
from launch.simulate.device_tensors import DeviceTensors
from launch.simulate.fake_device import pretend
from launch.simulate.rank_report import Recording
from launch.simulate.rank_work import record
from launch.simulate.step_recorder import StepRecorder
from lora.drafter.batches import DraftBatch, build_draft_batch
from lora.drafter.step import DraftStep, build_step
from lora.examples.example_set import Example
from model.convert.nld_config import describe_model
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel

DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp32: torch.float32}
BLOCK_SIZE, MASK_TOKEN_ID, EOS_TOKEN_ID = 32, 100, 2


def main() -> None:
    """Read CONFIG, write REPORT: argv holds both, an option of conf/model, and a kind of device."""
    path, report, model, device = sys.argv[1:]
    config = load_drafter_config(Path(path))
    pretend(KINDS[device])
    adapt_to_fake_tensors()
    recorded = simulate_step(config, compose_size([f"model={model}", "train.tokens=1e6"]).model)
    atomic_write_text(Path(report), json.dumps(recorded) + "\n")


def load_drafter_config(path: Path) -> DrafterConfig:
    """Read the configuration that the parent composed."""
    from omegaconf import OmegaConf

    from conf.composition.compose import to_config

    return to_config(OmegaConf.create(path.read_text(encoding="utf-8")), DRAFTER_TREE)  # type: ignore[arg-type]


def simulate_step(config: DrafterConfig, model: ModelConfig) -> dict[str, Any]:
    """Return bytes, modules and questions of one microbatch and the update; see drafter.ShardedMemory."""
    recorder, device = StepRecorder("cuda"), torch.device("cuda", 0)
    with DeviceTensors(recorder.ask), recorder.watching():
        with device:
            base = NemotronLabsDiffusionModel(build_model_config(model)).eval()
        base.to(DTYPES[config.runtime.dtype])  # pyright: ignore[reportArgumentType] (a wrapped method)
        step = build_step(base, config)
        trainable = [parameter for parameter in step.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable)
        for parameter in trainable:  # as after the first step
            parameter.grad = torch.empty_like(parameter)
            moments = {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
        recorder.modules.follow(step.model.named_modules())
        name_drafter_tensors(recorder, step, optimizer)
        batch = build_longest_batch(config, model)

        def train() -> None:
            loss, _ = step(batch.to(device))
            loss.backward()
            optimizer.step()

        return describe_step(record(recorder, train), sum(parameter.numel() for parameter in trainable))


def build_model_config(model: ModelConfig) -> NemotronLabsDiffusionConfig:
    """Return the configuration of an export of this model."""
    values = describe_model(model, "bfloat16", MASK_TOKEN_ID, BLOCK_SIZE, EOS_TOKEN_ID)
    unknown = ("auto_map", "model_type", "architectures")  # what the class says of itself
    return NemotronLabsDiffusionConfig(**{key: value for key, value in values.items() if key not in unknown})


def name_drafter_tensors(recorder: StepRecorder, step: DraftStep, optimizer: torch.optim.Optimizer) -> None:
    """Say what the tensors are for that outlive steps."""
    for parameter in step.parameters():
        recorder.memory.name([parameter], "adapter" if parameter.requires_grad else "weights")
        if parameter.grad is not None:
            recorder.memory.name([parameter.grad], "gradients")
    recorder.memory.name(step.buffers(), "weights")
    for state in optimizer.state.values():
        recorder.memory.name((value for value in state.values() if isinstance(value, Tensor)), "optimizer")


def build_longest_batch(config: DrafterConfig, model: ModelConfig) -> DraftBatch:
    """Return a microbatch of the longest sequences, in which every token may be drafted."""
    train = config.train
    generator = np.random.default_rng(train.seed)
    everywhere = np.ones(train.sequence_length, dtype=bool)
    examples = [
        Example(generator.integers(model.vocab_size, size=train.sequence_length), everywhere)
        for _ in range(train.micro_batch_size)
    ]
    block_size = config.block_size or BLOCK_SIZE
    return build_draft_batch(
        examples, range(len(examples)), blocks=train.blocks_per_sequence, block_size=block_size, seed=train.seed
    )


def describe_step(step: Recording, trainable: int) -> dict[str, Any]:
    """Describe the recording by plain values."""
    modules = Counter[str]()
    for name, num_bytes in step.modules.items():
        modules[re.sub(r"^base_model\.model\.|\.\d+(?=\.|$)", "", name)] += num_bytes
    return {
        "trainable": trainable,
        "peak": step.peak,
        "peak_module": step.peak_at.module,
        "kinds": step.kinds,
        "modules": dict(modules.most_common(10)),
        "largest": [asdict(tensors) for tensors in step.largest],
        "questions": [asdict(question) for question in step.questions],
    }


if __name__ == "__main__":
    main()

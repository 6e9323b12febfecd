"""Measure what `launch.plan` predicts: the tensors and messages of one training step of the real model per job.

`torchrun ... -m tests.helpers.plan_jobs JOBS.json FOLDER`: JOBS.json holds {name: overrides}; every rank writes
FOLDER/<name>_rank<r>.json {"weights", "gradients", "optimizer", "transient" (bytes), "checkpoint" (bytes of all ranks),
"sent" {collective: bytes of its messages}}.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from conf.composition.compose import compose_size
from conf.schema import RunConfig
from conf.system.entry import quiet_libraries
from data_pipeline.batch import Batch, PlacedImage, SequenceLayout
from data_pipeline.noise import NoiseSource
from launch.plan.step_work import SequenceKind
from model.attention.context import find_context_shard
from model.attention.plan import PlanBuilder
from model.hf.image_loading import PIXELS_PER_FEATURE
from model.hf.image_tokens import list_image_tokens
from model.megatron import cpu
from model.megatron.build import build_model_chunks
from model.megatron.transformer_config import TORCH_DTYPES
from pretrain.assemble import build_image_builder
from pretrain.checkpointing.sharded_state import build_sharded_state, count_bytes
from pretrain.run.model_parallel import distributed_session
from pretrain.run.process_group import gather_over_ranks
from pretrain.step.microbatches import MicrobatchBuilder, PreparedStep
from pretrain.step.optimizer import build_optimizer, wrap_data_parallel
from pretrain.step.schedule import run_schedule
from tests.helpers.live_bytes import LiveBytes, SentBytes, bytes_of

# Of models that read any: eight images of 16 features in 256 tokens.
IMAGES = SequenceKind(image_share=0.5, image_side=4)


def main() -> None:
    """Run the jobs of argv[1] in order."""
    quiet_libraries()
    cpu.install()
    dist.init_process_group("gloo")
    for name, overrides in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")).items():
        measured = measure_step(compose_size(overrides))
        path = Path(sys.argv[2]) / f"{name}_rank{dist.get_rank()}.json"
        path.write_text(json.dumps(measured), encoding="utf-8")
    dist.destroy_process_group()


def measure_step(config: RunConfig) -> dict[str, Any]:
    """Measure the second step; the first one allocates what is reused."""
    with distributed_session(config.parallel, config.runtime, config.train.seed) as ranks:
        chunks: list[Any] = build_model_chunks(
            config.model, config.parallel, config.precision, config.runtime.loss_chunk_rows
        )
        chunks = [chunk.to(ranks.device) for chunk in chunks]
        weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
        for weight in weights:
            torch.nn.init.normal_(weight, std=0.02)
        model: Any = wrap_data_parallel(chunks, config.parallel)
        optimizer = build_optimizer(model, config.optimizer, config.parallel, config.precision)
        plans = PlanBuilder(
            config.model,
            config.runtime.attention_backend,
            TORCH_DTYPES[config.precision.dtype],
            ranks.device,
            find_context_shard(config.stage.block_size),
        )
        noise = NoiseSource(1, "plan", "train", config.stage.noise_epsilon)
        # The plan is of the longest forwards.
        images = build_image_builder(config)
        builder = MicrobatchBuilder(config.stage, noise, 3, plans, config.noisy_lengths[-1:], images)
        buffers = [buffer for chunk in model for buffer in chunk.buffers]
        gradients = [buffer.grad_data for buffer in buffers]
        known = [*weights, *gradients]
        for _ in range(2):
            step = builder.prepare(_batches(config))
            for chunk in model:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            with SentBytes() as sent:
                transient = _peak_of_schedule(model, step, known)
                optimizer.step()
        state = build_sharded_state(model, optimizer, is_loading=False)
        return {
            "weights": bytes_of(weights),
            "gradients": sum(gradient.numel() * gradient.element_size() for gradient in gradients),
            "optimizer": bytes_of(_optimizer_tensors(optimizer), known),
            "transient": transient,
            "checkpoint": sum(gather_over_ranks(lambda: count_bytes(state))),
            "sent": sent.by_collective,
        }


def _peak_of_schedule(model: list[Any], step: PreparedStep, known: list[Tensor]) -> int:
    """Return the most bytes in use: of tensors on a CPU, as counted by the allocator on a GPU."""
    if not known[0].is_cuda:
        pixels = [image for microbatch in step.microbatches if microbatch.images for image in microbatch.images.pixels]
        with LiveBytes([*known, *pixels]) as live:
            run_schedule(model, step, forward_only=False)
        return live.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_schedule(model, step, forward_only=False)
    return torch.cuda.max_memory_allocated() - before


def _batches(config: RunConfig) -> list[Batch]:
    """Return this rank's share of a global batch of random tokens, one document per sequence, perhaps with images."""
    size, length = config.train.micro_batch_size, config.data.sequence_length
    positions = torch.arange(length).repeat(size, 1)
    zeros, none = torch.zeros_like(positions), torch.zeros_like(positions, dtype=torch.bool)
    blocks, tokens = positions // config.stage.block_size, torch.randint(30, config.model.vocab_size, positions.shape)
    images = _place_images(config, tokens)
    batch = Batch(tokens, SequenceLayout(zeros, blocks, positions, none), ~none, torch.arange(size), images)
    share = config.train.global_batch_size // (size * parallel_state.get_data_parallel_world_size())
    return [batch] * share


def _place_images(config: RunConfig, tokens: Tensor) -> tuple[PlacedImage, ...]:
    """Write image tokens into `tokens`, as many as IMAGES asks for, and return the images with pixels."""
    if config.model.vision is None:
        return ()
    images, side, stored = [], IMAGES.image_side, None
    num_images = round(config.data.sequence_length * IMAGES.image_share) // side**2
    ids = torch.tensor(list_image_tokens((side, side)))
    for sequence in range(len(tokens)):
        for first in range(0, num_images * len(ids), len(ids)):
            tokens[sequence, first : first + len(ids)] = ids
            pixels = torch.randn(3, side * PIXELS_PER_FEATURE, side * PIXELS_PER_FEATURE)
            images.append(PlacedImage(sequence, first, (side, side), stored, pixels))  # type: ignore[arg-type]
    return tuple(images)


def _optimizer_tensors(optimizer: Any) -> Iterable[Tensor]:
    """Yield fp32 weights and Adam's moments, without step counters."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from (value for value in inner.optimizer.state[parameter].values() if value.dim())


if __name__ == "__main__":
    main()

"""What leaving images out of the noisy half saves: the stage with images against the whole doubled forward.

`python -m tests.bench.bench_images` on one thread: sequences of which 30, 60 and 90 % are image tokens, an image and
its response in each chat; time of forward and backward in interleaved pairs, most bytes of live tensors, FLOPs.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from conf.schema import (
    AttentionBackend,
    Device,
    Dtype,
    ModelConfig,
    Objective,
    ParallelConfig,
    PrecisionConfig,
    RuntimeConfig,
    StageConfig,
    VisionConfig,
)
from data_pipeline.batch import Batch, PlacedImage
from data_pipeline.noise import NoiseSource
from data_pipeline.packing.form import SequenceForm
from model.attention.plan import PlanBuilder
from model.hf.image_tokens import count_image_tokens, list_image_tokens
from model.megatron.build import build_model_chunks
from model.megatron.initialise import initialise_weights
from pretrain.costs import count_step_flops
from pretrain.run.model_parallel import distributed_session
from pretrain.step.images import ImageBuilder
from pretrain.step.microbatches import MicrobatchBuilder, PreparedStep
from tests.bench.timing import time_interleaved
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.packed import pack_chats

VISION = VisionConfig(num_layers=2, hidden_size=128, ffn_hidden_size=384, num_attention_heads=2)
MODEL = ModelConfig("bench", 4, 256, 768, 8, 2, 32, 2048, vision=VISION)
LENGTH, BLOCK_SIZE, MASK, SIDE, ROUNDS = 1024, 16, 100, 8, 15
IMAGE = (SIDE, SIDE)
NUM_IMAGES = {0.3: 4, 0.6: 8, 0.9: 12}  # of 73 tokens each


def main() -> None:
    """Print a line per share of image tokens."""
    with distributed_session(ParallelConfig(), RuntimeConfig(device=Device.cpu), seed=0):
        (model,) = build_model_chunks(MODEL, ParallelConfig(), PrecisionConfig(Dtype.fp32), loss_chunk_rows=512)
        initialise_weights([model], MODEL, seed=0)
        print("image tokens   time   FLOPs   memory   (live blocks, relative to the whole doubled forward)")
        for share, num_images in NUM_IMAGES.items():
            batch = build_batch(num_images)
            lengths = tuple(range(LENGTH // 8, LENGTH + 1, LENGTH // 8))
            live, whole = prepare(batch, lengths), prepare(batch, lengths[-1:])
            seconds = time_interleaved([partial(train, model, step) for step in (live, whole)], ROUNDS)
            flops = [count_flops(step) for step in (live, whole)]
            peaks = [measure_peak(model, step) for step in (live, whole)]
            ratios = [part / of_whole for part, of_whole in (seconds, flops, peaks)]
            print(f"{share:>12.0%}   {ratios[0]:.2f}   {ratios[1]:.2f}    {ratios[2]:.2f}")


def build_batch(num_images: int) -> Batch:
    """Build a sequence of chats, an image in the prompt of each, that share the rest of the sequence."""
    tokens, room = count_image_tokens(IMAGE), LENGTH // num_images // BLOCK_SIZE * BLOCK_SIZE
    prompt = tokens + 2
    response = room - -(-prompt // BLOCK_SIZE) * BLOCK_SIZE
    batch = pack_chats([[[prompt, response]] * num_images], SequenceForm(LENGTH, BLOCK_SIZE, BLOCK_SIZE), 2000)
    batch.tokens[batch.tokens < 30] += 30
    images, stored = [], None
    for first in range(0, num_images * room, room):
        batch.tokens[0, first : first + tokens] = torch.tensor(list_image_tokens(IMAGE))
        images.append(PlacedImage(0, first, IMAGE, stored, torch.randn(3, SIDE * 28, SIDE * 28)))  # type: ignore[arg-type]
    return replace(batch, images=tuple(images))


def prepare(batch: Batch, noisy_lengths: tuple[int, ...]) -> PreparedStep:
    """Return a step of one microbatch."""
    plans = PlanBuilder(MODEL, AttentionBackend.cpu, torch.float32, torch.device("cpu"))
    stage = StageConfig("vlm", Objective.joint, block_size=BLOCK_SIZE)
    noise, images = NoiseSource(1, "vlm", "train", 1e-3), ImageBuilder(VISION, sequence_parallel=False)
    return MicrobatchBuilder(stage, noise, MASK, plans, noisy_lengths, images=images).prepare([batch])


def train(model: Any, step: PreparedStep) -> None:
    """Run forward and backward."""
    (microbatch,) = step.microbatches
    model.zero_grad()
    loss, _ = model(microbatch.tokens, microbatch.plan, microbatch.scored, microbatch.images)
    loss.backward()


def measure_peak(model: Any, step: PreparedStep) -> int:
    """Return the most bytes of tensors made by forward and backward, gradients of weights included."""
    (microbatch,) = step.microbatches
    pixels = microbatch.images.pixels if microbatch.images else ()
    with LiveBytes([*model.parameters(), *pixels]) as live:
        train(model, step)
    return live.peak


def count_flops(step: PreparedStep) -> float:
    """Return the FLOPs of the computed positions, and of the useful attended pairs."""
    counts = step.counts
    scored = int(counts.clean + counts.masked)
    others = (int(counts.attended_pairs), scored, int(counts.patches), int(counts.attended_patches))
    return sum(count_step_flops(MODEL, int(counts.computed_positions), *others))


if __name__ == "__main__":
    main()

"""The model's own responses as text to draft (on-policy), decoded once and cached.

    prompts, by length --> shards --> batches of equal length --decode_ar--> cache --> examples

Prompts and settings alone decide which prompts a shard and a batch hold, and every batch has a seed of its own. So
responses depend neither on the number of ranks nor on where an earlier run was interrupted.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.schema.drafter import ResponsesConfig, ResponseSource
from conf.system.errors import UserError
from data_pipeline.order import derive_key
from lora.examples.example_set import Example, ExampleSet, hash_values
from lora.examples.prompts import PromptSet
from lora.examples.response_cache import ResponseCache, ResponseShard
from model.export.images import load_pixels
from model.hf.decoding import decode_ar
from model.hf.options import AR, DecodeOptions

RESPONSES_VERSION = 1  # goes up when prompts are chosen, ordered or responded to in another way
logger = logging.getLogger(__name__)

# Called with (prompts responded to, prompts to respond to), both of this rank in this run.
ResponseProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ResponseTask:
    """The prompts to respond to and the settings that decide the responses.

    numbers, prompt_lengths: [p] int64, each prompt's number in `prompts` and its tokens; shortest first.
    left_out: numbers without a prompt. temperature: 0 is greedy. stop_ids: tokens that end a response.
    cache: where the responses are stored.
    """

    prompts: PromptSet
    config: ResponsesConfig
    numbers: np.ndarray
    prompt_lengths: np.ndarray
    left_out: int
    temperature: float
    seed: int
    stop_ids: tuple[int, ...]
    cache: ResponseCache

    @property
    def num_shards(self) -> int:
        """Count the shards of all ranks."""
        return -(-len(self.numbers) // self.config.prompts_per_shard)

    def shard_range(self, shard: int) -> slice:
        """Return the range of prompts of a shard."""
        start = shard * self.config.prompts_per_shard
        return slice(start, start + self.config.prompts_per_shard)


def build_response_task(
    prompts: PromptSet,
    config: ResponsesConfig,
    *,
    cache: Path,
    checkpoint: str,
    dtype: torch.dtype,
    stop_ids: tuple[int, ...],
    seed: int,
) -> ResponseTask:
    """Order the prompts by length and name everything that decides their responses.

    cache: parent folder. checkpoint: identity of the weights. dtype: in which responses are computed.
    seed: of sampled responses.

    Raises: UserError if there is no prompt.
    """
    assert config.source is not ResponseSource.given
    lengths = prompts.lengths
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    left_out = len(lengths) - len(order)
    if not len(order):
        raise UserError(
            f"no text has more than responses.prompt_tokens={config.prompt_tokens} tokens, so there is nothing to "
            "respond to: lower it or give longer texts"
        )
    if left_out:
        logger.warning("%d of %d sequences have no room for a prompt and a response: left out", left_out, len(lengths))
    is_sampled = config.source is ResponseSource.sampled
    temperature, seed = (config.temperature, seed) if is_sampled else (0.0, 0)
    settings = _describe_prompts(prompts, config) | {
        "checkpoint": checkpoint,
        "dtype": str(dtype),
        "temperature": temperature,
        "seed": seed,
        "stop_ids": sorted(stop_ids),
    }
    found = ResponseCache(cache, settings)
    return ResponseTask(prompts, config, order, lengths[order], left_out, temperature, seed, stop_ids, found)


def decode_responses(
    model: Any, task: ResponseTask, *, rank: int = 0, world_size: int = 1, progress: ResponseProgress | None = None
) -> None:
    """Decode the shards rank, rank + world_size, ... that are not in the cache yet.

    model: in the exported format; an attached draft adapter is not used. torch's generators keep their state.

    Raises: UserError if the cache cannot be written.
    """
    missing = [shard for shard in range(rank, task.num_shards, world_size) if not task.cache.path(shard).exists()]
    total = sum(len(task.numbers[task.shard_range(shard)]) for shard in missing)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for shard in missing:
        task.cache.save(shard, _decode_shard(model, task, shard, advance))


def load_responses(task: ResponseTask) -> "ResponseExamples":
    """Load the responses of all ranks. Raises: UserError if one is missing or damaged."""
    numbers = [task.numbers[task.shard_range(shard)] for shard in range(task.num_shards)]
    shards = [task.cache.load(shard, expected) for shard, expected in enumerate(numbers)]
    return ResponseExamples(task, shards)


class ResponseExamples(ExampleSet):
    """Prompts with the model's responses, in the order of the prompts; the responses may be drafted.

    All tokens are in memory, 4 bytes each; images are not.
    """

    def __init__(self, task: ResponseTask, shards: list[ResponseShard]) -> None:
        self.sequence_length, self._prompts = task.prompts.sequence_length, task.prompts
        # "answers" is part of the fingerprint in checkpoints of earlier runs, so it stays.
        self.fingerprint = hash_values("answers", task.cache.identity)
        self._tokens = np.concatenate([shard.tokens for shard in shards])
        self._prompt_lengths = np.concatenate([shard.prompt_lengths for shard in shards])
        self._ends = np.cumsum(np.concatenate([shard.lengths for shard in shards]))
        self._numbers = np.concatenate([shard.examples for shard in shards])
        self._order = np.argsort(self._numbers, kind="stable")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        place = int(self._order[index])
        start = int(self._ends[place - 1]) if place else 0
        tokens = self._tokens[start : int(self._ends[place])].astype(np.int64)
        images = self._prompts.read_images(int(self._numbers[place]))
        return Example(tokens, np.arange(len(tokens)) >= self._prompt_lengths[place], images)


def _describe_prompts(prompts: PromptSet, config: ResponsesConfig) -> dict[str, Any]:
    """Return what decides the prompts and their batches, for the cache."""
    return prompts.identity | {
        "version": RESPONSES_VERSION,
        "source": config.source.value,
        "max_new_tokens": config.max_new_tokens,
        "prompts_per_shard": config.prompts_per_shard,
        "batch_size": config.batch_size,
    }


def _decode_shard(model: Any, task: ResponseTask, shard: int, advance: Callable[[int], None]) -> ResponseShard:
    sequences: list[np.ndarray] = []
    for number, prompts in enumerate(_cut_batches(task, shard)):
        tokens = np.stack([task.prompts.read(prompt) for prompt in prompts.tolist()])
        pixels = load_pixels(image for prompt in prompts.tolist() for image in task.prompts.read_images(prompt))
        key = derive_key(task.seed, shard, number)
        sequences += _decode_batch(model, task, torch.from_numpy(tokens), key, pixels)
        advance(len(prompts))
    chosen = task.shard_range(shard)
    return ResponseShard(
        examples=task.numbers[chosen],
        prompt_lengths=task.prompt_lengths[chosen],
        lengths=np.array([len(sequence) for sequence in sequences], dtype=np.int64),
        tokens=np.concatenate(sequences).astype(np.int32),
    )


def _cut_batches(task: ResponseTask, shard: int) -> Iterator[np.ndarray]:
    """Yield the numbers of up to config.batch_size prompts of equal length, in the shard's order."""
    chosen = task.shard_range(shard)
    numbers, lengths = task.numbers[chosen], task.prompt_lengths[chosen]
    start = 0
    for _, group in groupby(lengths.tolist()):
        end = start + len(list(group))
        for first in range(start, end, task.config.batch_size):
            yield numbers[first : min(first + task.config.batch_size, end)]
        start = end


def _decode_batch(
    model: Any, task: ResponseTask, prompt_ids: Tensor, seed: int, pixels: dict[str, Tensor]
) -> list[np.ndarray]:
    """Return each prompt of prompt_ids [B, P] with its response, up to a stop token or the end of the sequence.

    pixels: of all their images, as model/export/images.py loads them.
    """
    room = task.prompts.sequence_length - prompt_ids.shape[1]
    options = DecodeOptions(
        max_new_tokens=min(task.config.max_new_tokens, room),
        temperature=task.temperature,
        seed=seed,
        eos_token_id=task.stop_ids,
    )
    embeds = model.embed_prompt(prompt_ids, **pixels) if pixels else None
    result = decode_ar(model, prompt_ids, options.for_mode(AR), None, embeds)
    ends = [prompt_ids.shape[1] + count for count in result.num_new_tokens]
    return [sequence[:end] for sequence, end in zip(result.output_ids.cpu().numpy(), ends, strict=True)]

"""The model's own answers as text to draft (on-policy), decoded once and kept.

    prompts, by length --> shards --> batches of equal length --decode_ar--> cache --> examples

Which prompts a shard and a batch hold depends on prompts and settings alone, and every batch has a seed of its own: so
answers do not depend on the number of ranks, nor on where an earlier run was interrupted.
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

from conf.schema.drafter import AnswersConfig, AnswerSource
from conf.system.errors import UserError
from data_pipeline.order import derive_key
from lora.answer_cache import AnswerCache, AnswerShard
from lora.examples import Example, ExampleSet, hash_values
from lora.prompts import PromptSet
from model.hf.decoding import decode_ar
from model.hf.options import DecodeOptions

VERSION = 1  # of how prompts are chosen, ordered and answered
logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # prompts answered, prompts to answer: of this rank, in this run


@dataclass(frozen=True)
class AnswerPlan:
    """What is to be answered, and how.

    numbers, prompt_lengths: [p] int64, of each prompt its number in `prompts` and its tokens; shortest first.
    left_out: numbers without a prompt. temperature: 0 is greedy. stop_ids: tokens that end an answer.
    cache: where the answers are kept.
    """

    prompts: PromptSet
    config: AnswersConfig
    numbers: np.ndarray
    prompt_lengths: np.ndarray
    left_out: int
    temperature: float
    seed: int
    stop_ids: tuple[int, ...]
    cache: AnswerCache

    @property
    def num_shards(self) -> int:
        """Shards of all ranks."""
        return -(-len(self.numbers) // self.config.prompts_per_shard)

    def shard_range(self, shard: int) -> slice:
        """The prompts of a shard."""
        start = shard * self.config.prompts_per_shard
        return slice(start, start + self.config.prompts_per_shard)


def plan_answers(
    prompts: PromptSet,
    config: AnswersConfig,
    *,
    cache: Path,
    checkpoint: str,
    dtype: torch.dtype,
    stop_ids: tuple[int, ...],
    seed: int,
) -> AnswerPlan:
    """Order the prompts by length, and find what decides their answers.

    cache: parent folder. checkpoint: identity of the weights. dtype: they are computed in. seed: of sampled answers.
    Raises: UserError if there is no prompt.
    """
    assert config.source is not AnswerSource.given
    lengths = prompts.lengths
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    left_out = len(lengths) - len(order)
    if not len(order):
        raise UserError(
            f"no text has more than answers.prompt_tokens={config.prompt_tokens} tokens, so there is nothing to "
            "answer: lower it or give longer texts"
        )
    if left_out:
        logger.warning("%d of %d sequences have no room for a prompt and an answer: left out", left_out, len(lengths))
    is_sampled = config.source is AnswerSource.sampled
    temperature, seed = (config.temperature, seed) if is_sampled else (0.0, 0)
    settings = _spell_out(prompts, config) | {
        "checkpoint": checkpoint,
        "dtype": str(dtype),
        "temperature": temperature,
        "seed": seed,
        "stop_ids": sorted(stop_ids),
    }
    found = AnswerCache(cache, settings)
    return AnswerPlan(prompts, config, order, lengths[order], left_out, temperature, seed, stop_ids, found)


def answer_prompts(
    model: Any, plan: AnswerPlan, *, rank: int = 0, world_size: int = 1, progress: Progress | None = None
) -> None:
    """Answer the shards rank, rank + world_size, ... that are not in the cache yet.

    model: in the exported format; a draft adapter, if attached, is not used. The state of torch's generators stays.
    Raises: UserError if the cache cannot be written.
    """
    missing = [shard for shard in range(rank, plan.num_shards, world_size) if not plan.cache.path(shard).exists()]
    total = sum(len(plan.numbers[plan.shard_range(shard)]) for shard in missing)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for shard in missing:
        plan.cache.save(shard, _answer_shard(model, plan, shard, advance))


def load_answers(plan: AnswerPlan) -> "AnsweredExamples":
    """All answers, of all ranks. Raises: UserError if one is missing or damaged."""
    numbers = [plan.numbers[plan.shard_range(shard)] for shard in range(plan.num_shards)]
    shards = [plan.cache.load(shard, expected) for shard, expected in enumerate(numbers)]
    return AnsweredExamples(plan, shards)


class AnsweredExamples(ExampleSet):
    """Prompts with the model's answers, in the order of the prompts; the answers may be drafted.

    All tokens are in memory, 4 bytes each.
    """

    def __init__(self, plan: AnswerPlan, shards: list[AnswerShard]) -> None:
        self.sequence_length = plan.prompts.sequence_length
        self.fingerprint = hash_values("answers", plan.cache.identity)
        self._tokens = np.concatenate([shard.tokens for shard in shards])
        self._prompt_lengths = np.concatenate([shard.prompt_lengths for shard in shards])
        self._ends = np.cumsum(np.concatenate([shard.lengths for shard in shards]))
        self._order = np.argsort(np.concatenate([shard.examples for shard in shards]), kind="stable")

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        place = int(self._order[index])
        start = int(self._ends[place - 1]) if place else 0
        tokens = self._tokens[start : int(self._ends[place])].astype(np.int64)
        return Example(tokens, np.arange(len(tokens)) >= self._prompt_lengths[place])


def _spell_out(prompts: PromptSet, config: AnswersConfig) -> dict[str, Any]:
    """What decides the prompts and their batches, for the cache."""
    return prompts.identity | {
        "version": VERSION,
        "source": config.source.value,
        "max_new_tokens": config.max_new_tokens,
        "prompts_per_shard": config.prompts_per_shard,
        "batch_size": config.batch_size,
    }


def _answer_shard(model: Any, plan: AnswerPlan, shard: int, advance: Callable[[int], None]) -> AnswerShard:
    rows: list[np.ndarray] = []
    for number, prompts in enumerate(_cut_batches(plan, shard)):
        tokens = np.stack([plan.prompts.read(prompt) for prompt in prompts.tolist()])
        rows += _answer_batch(model, plan, torch.from_numpy(tokens), derive_key(plan.seed, shard, number))
        advance(len(prompts))
    chosen = plan.shard_range(shard)
    return AnswerShard(
        examples=plan.numbers[chosen],
        prompt_lengths=plan.prompt_lengths[chosen],
        lengths=np.array([len(row) for row in rows], dtype=np.int64),
        tokens=np.concatenate(rows).astype(np.int32),
    )


def _cut_batches(plan: AnswerPlan, shard: int) -> Iterator[np.ndarray]:
    """Numbers of up to config.batch_size prompts of equal length, in the shard's order."""
    chosen = plan.shard_range(shard)
    numbers, lengths = plan.numbers[chosen], plan.prompt_lengths[chosen]
    start = 0
    for _, group in groupby(lengths.tolist()):
        end = start + len(list(group))
        for first in range(start, end, plan.config.batch_size):
            yield numbers[first : min(first + plan.config.batch_size, end)]
        start = end


def _answer_batch(model: Any, plan: AnswerPlan, prompt_ids: Tensor, seed: int) -> list[np.ndarray]:
    """Prompt and answer of every row of prompt_ids [B, P], up to its stop token or the end of the sequence."""
    room = plan.prompts.sequence_length - prompt_ids.shape[1]
    options = DecodeOptions(
        max_new_tokens=min(plan.config.max_new_tokens, room),
        temperature=plan.temperature,
        seed=seed,
        eos_token_id=plan.stop_ids,
    )
    result = decode_ar(model, prompt_ids, options)
    ends = [prompt_ids.shape[1] + count for count in result.num_new_tokens]
    return [row[:end] for row, end in zip(result.output_ids.cpu().numpy(), ends, strict=True)]

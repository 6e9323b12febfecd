"""The sequences of a run: opened, split, and, where asked for, answered by the model itself."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.schema.drafter import AnswerSource, DrafterConfig
from lora.answers import answer_prompts, load_answers, plan_answers
from lora.examples import ExampleSet, StoredExamples, hash_values, open_examples, select_examples, split_heldout
from lora.rows import prepare_examples
from model.load import find_stop_ids

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DrafterData:
    """train, heldout: what is drafted. fingerprint: hash of both."""

    train: ExampleSet
    heldout: ExampleSet

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes an example."""
        return hash_values(self.train.fingerprint, self.heldout.fingerprint)


@dataclass(frozen=True)
class StoredData(DrafterData):
    """As the data files give them."""

    train: StoredExamples
    heldout: StoredExamples


def open_data(config: DrafterConfig) -> StoredData:
    """All ranks together; the first one tokenises what is not. Raises: UserError for data that cannot be used."""
    train = _open(config, config.data, "train")
    if config.heldout is None:
        train, heldout = split_heldout(train, config.evaluation.share)
    else:
        heldout = _open(config, config.heldout, "heldout")
    return StoredData(train, select_examples(heldout, config.evaluation.sequences, seed=0))


def answer_data(config: DrafterConfig, data: StoredData, model: Any, identity: str, progress: Progress) -> DrafterData:
    """`data` with the model's own answers in place of the given ones, if the configuration says so.

    model: without adapter. identity: of its weights. All ranks together; each answers its part.
    """
    if config.answers.source is AnswerSource.given:
        return data
    cache = Path(config.answers.cache or Path(config.run.dir, "answers"))
    plans = [
        plan_answers(
            examples,
            config.answers,
            cache=cache,
            checkpoint=identity,
            dtype=model.dtype,
            stop_ids=find_stop_ids(model),
            seed=config.train.seed,
        )
        for examples in (select_examples(data.train, config.answers.prompts, config.train.seed), data.heldout)
    ]
    for plan in plans:
        answer_prompts(model, plan, rank=dist.get_rank(), world_size=dist.get_world_size(), progress=progress)
    dist.barrier()
    train, heldout = (load_answers(plan) for plan in plans)
    return DrafterData(train, heldout)


def _open(config: DrafterConfig, path: str, split: str) -> Any:
    folder = Path(config.run.dir, "data", split)
    checkpoint = Path(config.checkpoint)
    if dist.get_rank() == 0:
        prepare_examples(path, checkpoint=checkpoint, folder=folder, chat_template=config.chat_template)
    dist.barrier()
    return open_examples(
        path,
        checkpoint=checkpoint,
        sequence_length=config.train.sequence_length,
        folder=folder,
        checks_files=dist.get_rank() == 0,
    )

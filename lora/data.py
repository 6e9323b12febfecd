"""The sequences of a run: opened, split, and, where asked for, answered by the model itself."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.schema.drafter import AnswerSource, DrafterConfig
from lora.answers import Progress, answer_prompts, load_answers, plan_answers
from lora.examples import ExampleSet, StoredExamples, hash_values, open_examples, select_examples, split_heldout
from lora.prompts import ExamplePrompts, PromptSet, RowPrompts, find_prompt_files, open_row_prompts
from lora.rows import prepare_examples
from model.export.load import find_stop_ids
from pretrain.run.process_group import run_on_first_rank


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
class OpenedData:
    """As the data files give them: examples, or prompts that are to be answered."""

    train: StoredExamples | RowPrompts
    heldout: StoredExamples | RowPrompts


def open_data(config: DrafterConfig) -> OpenedData:
    """All ranks together; the first one tokenises what is not. Raises: UserError for data that cannot be used."""
    train = _open(config, config.data, "train")
    if config.heldout is None:
        train, heldout = split_heldout(train, config.evaluation.share)
    else:
        heldout = _open(config, config.heldout, "heldout")
    return OpenedData(train, select_examples(heldout, config.evaluation.sequences, seed=0))


def answer_data(config: DrafterConfig, data: OpenedData, model: Any, identity: str, progress: Progress) -> DrafterData:
    """`data` with the model's own answers in place of the given ones, if the configuration says so.

    model: without adapter. identity: of its weights. All ranks together; each answers its part.
    """
    if config.answers.source is AnswerSource.given:
        assert isinstance(data.train, ExampleSet) and isinstance(data.heldout, ExampleSet)
        return DrafterData(data.train, data.heldout)
    chosen = select_examples(data.train, config.answers.prompts, config.train.seed)
    plans = [
        plan_answers(
            _ask(side, config),
            config.answers,
            cache=Path(config.answers.cache or Path(config.run.dir, "answers")),
            checkpoint=identity,
            dtype=model.dtype,
            stop_ids=find_stop_ids(model),
            seed=config.train.seed,
        )
        for side in (chosen, data.heldout)
    ]
    for plan in plans:
        answer_prompts(model, plan, rank=dist.get_rank(), world_size=dist.get_world_size(), progress=progress)
    dist.barrier()
    train, heldout = (load_answers(plan) for plan in plans)
    return DrafterData(train, heldout)


def _ask(side: StoredExamples | RowPrompts, config: DrafterConfig) -> PromptSet:
    return side if isinstance(side, PromptSet) else ExamplePrompts(side, config.answers.prompt_tokens)


def _open(config: DrafterConfig, path: str, split: str) -> StoredExamples | RowPrompts:
    """Prompts if the model answers them and `path` holds .jsonl files, which every rank reads; else examples."""
    if config.answers.source is not AnswerSource.given and (files := find_prompt_files(path)):
        return open_row_prompts(
            files,
            checkpoint=Path(config.checkpoint),
            sequence_length=config.train.sequence_length,
            prompt_tokens=config.answers.prompt_tokens,
            chat_template=config.chat_template,
        )
    return _open_examples(config, path, Path(config.run.dir, "data", split))


def _open_examples(config: DrafterConfig, path: str, folder: Path) -> StoredExamples:
    """Tokens of `path`, made in `folder` by the first rank if it holds rows."""
    checkpoint = Path(config.checkpoint)
    run_on_first_rank(
        partial(prepare_examples, path, checkpoint=checkpoint, folder=folder, chat_template=config.chat_template)
    )
    return open_examples(
        path,
        checkpoint=checkpoint,
        sequence_length=config.train.sequence_length,
        folder=folder,
        checks_files=dist.get_rank() == 0,
    )

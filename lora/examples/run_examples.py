"""The examples of a run: opened, split and, if the configuration says so, responded to by the model itself."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.schema.drafter import DrafterConfig, ResponseSource
from lora.examples.example_set import ExampleSet, hash_values, select_examples, split_heldout
from lora.examples.prompts import ExamplePrompts, PromptSet, RecordPrompts, find_prompt_files, open_record_prompts
from lora.examples.records import prepare_examples
from lora.examples.response_cache import RUN_CACHE_FOLDER
from lora.examples.responses import ResponseProgress, build_response_task, decode_responses, load_responses
from lora.examples.stored_examples import StoredExamples, open_examples
from model.export.load import find_stop_ids
from pretrain.run.process_group import run_on_every_rank, run_on_first_rank


@dataclass(frozen=True)
class RunExamples:
    """The examples that a run trains on, and those held out."""

    train: ExampleSet
    heldout: ExampleSet

    @property
    def fingerprint(self) -> str:
        """Hash of both sets; it changes with anything that changes an example."""
        return hash_values(self.train.fingerprint, self.heldout.fingerprint)


@dataclass(frozen=True)
class OpenedExamples:
    """The content of the data files: examples, or prompts that still need responses."""

    train: StoredExamples | RecordPrompts
    heldout: StoredExamples | RecordPrompts


def open_run_examples(config: DrafterConfig) -> OpenedExamples:
    """Open the data of a run on all ranks together; the first rank tokenises records.

    Raises: UserError for data that cannot be used.
    """
    train = _open(config, config.data, "train")
    if config.heldout is None:
        train, heldout = split_heldout(train, config.evaluation.share)
    else:
        heldout = _open(config, config.heldout, "heldout")
    return OpenedExamples(train, select_examples(heldout, config.evaluation.sequences, seed=0))


def add_responses(
    config: DrafterConfig, opened: OpenedExamples, model: Any, identity: str, progress: ResponseProgress
) -> RunExamples:
    """Replace given text by the model's own responses if responses.source says so; all ranks together.

    model: without adapter. identity: of its weights. Each rank decodes its part.

    Raises: UserError on every rank if there is no prompt, or if one rank cannot write its responses.
    """
    if config.responses.source is ResponseSource.given:
        assert isinstance(opened.train, ExampleSet) and isinstance(opened.heldout, ExampleSet)
        return RunExamples(opened.train, opened.heldout)
    chosen = select_examples(opened.train, config.responses.prompts, config.train.seed)
    tasks = [
        build_response_task(
            _as_prompts(side, config),
            config.responses,
            cache=Path(config.responses.cache or Path(config.run.dir, RUN_CACHE_FOLDER)),
            checkpoint=identity,
            dtype=model.dtype,
            stop_ids=find_stop_ids(model),
            seed=config.train.seed,
        )
        for side in (chosen, opened.heldout)
    ]

    def decode() -> None:
        for task in tasks:
            decode_responses(model, task, rank=dist.get_rank(), world_size=dist.get_world_size(), progress=progress)

    run_on_every_rank(decode)
    train, heldout = (load_responses(task) for task in tasks)
    return RunExamples(train, heldout)


def _as_prompts(side: StoredExamples | RecordPrompts, config: DrafterConfig) -> PromptSet:
    return side if isinstance(side, PromptSet) else ExamplePrompts(side, config.responses.prompt_tokens)


def _open(config: DrafterConfig, path: str, split: str) -> StoredExamples | RecordPrompts:
    """Open examples; or prompts, if the model responds to them and `path` holds .jsonl files."""
    if config.responses.source is not ResponseSource.given and (files := find_prompt_files(path)):
        return open_record_prompts(
            files,
            checkpoint=Path(config.checkpoint),
            sequence_length=config.train.sequence_length,
            prompt_tokens=config.responses.prompt_tokens,
            chat_template=config.chat_template,
        )
    return _open_examples(config, path, Path(config.run.dir, "data", split))


def _open_examples(config: DrafterConfig, path: str, folder: Path) -> StoredExamples:
    """Open the tokens of `path`; if it holds records, the first rank tokenises them into `folder` before."""
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

"""Check tokenizer and tokenised sources: present, complete, made for each other and for the model, and large enough."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import RunConfig, SourceConfig
from conf.system.errors import UserError
from launch.preflight.runner import Finding, TrainingJob

if TYPE_CHECKING:  # imports torch
    from pretrain.run.run_data import RunData

ONE_EPOCH = 1.0


def check_data_tokenizer(job: TrainingJob) -> Iterator[Finding]:
    """Check that it has mask and end-of-sequence tokens, and no more entries than the model."""
    from pretrain.run.run_data import open_tokenizer

    config = job.config
    tokenizer = open_tokenizer(config)
    yield Finding.ok(
        f"{config.data.tokenizer}: {tokenizer.vocab_size} entries (model.vocab_size={config.model.vocab_size}), "
        f"mask token {tokenizer.mask_token_id}, fingerprint {tokenizer.fingerprint[:12]}"
    )


def check_training_data(job: TrainingJob) -> Iterator[Finding]:
    """Check each source by itself, so that one attempt shows every problem; then report what the run reads of each."""
    from pretrain.run.run_data import open_data

    config = job.config
    problems = list(_find_problems(config, config.data.train))
    yield from problems
    if problems:
        return
    job.data = open_data(_with_sources(config, config.data.train, None))
    yield from _describe_reading(job)
    yield from _find_unwritable_folders(config.data.train)


def check_heldout_data(job: TrainingJob) -> Iterator[Finding]:
    """Check the sources of evaluation in the same way, and that they are not trained on."""
    from pretrain.run.run_data import describe_overlap, open_data

    config = job.config
    if not config.data.heldout:
        yield Finding.warning("data.heldout is not given: held-out losses will not be measured")
        return
    problems = list(_find_problems(config, config.data.heldout))
    yield from problems
    if problems:
        return
    has_training_data = job.data is not None
    data = open_data(
        _with_sources(config, config.data.train if has_training_data else config.data.heldout, config.data.heldout)
    )
    if has_training_data:
        job.data = data
        for line in describe_overlap(data):
            yield Finding.warning(f"{line}; prepare them with input.records=train and input.records=heldout")
    yield _describe_evaluation(config, data)


def _describe_evaluation(config: RunConfig, data: "RunData") -> Finding:
    assert data.heldout is not None
    available, wanted = data.heldout.num_samples_without_repeats, config.evaluation.sequences
    if available < wanted:
        return Finding.ok(f"{available} sequences, fewer than evaluation.sequences={wanted}: all of them are evaluated")
    return Finding.ok(f"{wanted} of {available} sequences, every {config.evaluation.every_steps} steps")


def _find_problems(config: RunConfig, sources: dict[str, SourceConfig]) -> Iterator[Finding]:
    """Yield a finding per source that cannot be opened."""
    from pretrain.run.run_data import open_data

    for name, source in sources.items():
        try:
            open_data(_with_sources(config, {name: source}, None))
        except (UserError, OSError) as error:
            yield Finding.failed(f"{name}: {error}")


def _with_sources(
    config: RunConfig, train: dict[str, SourceConfig], heldout: dict[str, SourceConfig] | None
) -> RunConfig:
    return replace(config, data=replace(config.data, train=train, heldout=heldout))


def _describe_reading(job: TrainingJob) -> Iterator[Finding]:
    """Report how many tokens the run reads of each source; warn if it reads a source more than once."""
    assert job.data is not None
    config, blend = job.config, job.data.train
    num_samples = config.num_steps * config.train.global_batch_size
    shares = blend.shares()
    for name, epochs in blend.epochs(num_samples).items():
        counts = blend.sources[name].counts
        detail = (
            f"{name}: {counts.tokens:.4g} tokens in {counts.sequences} sequences; the run reads "
            f"{shares[name] * num_samples * config.data.sequence_length:.4g} ({shares[name]:.1%} of its tokens), "
            f"{epochs:.3g} epochs"
        )
        if epochs > ONE_EPOCH:
            yield Finding.warning(f"{detail}: it repeats; prepare more, lower train.tokens or this source's weight")
        else:
            yield Finding.ok(detail)


def _find_unwritable_folders(sources: dict[str, SourceConfig]) -> Iterator[Finding]:
    """Warn where the packing index, which the first opening builds, cannot be stored next to the data."""
    for name, source in sources.items():
        path = Path(source.path)
        folder = path if path.is_dir() else path.parent
        if not os.access(folder, os.W_OK) and not any(folder.glob("packing_*.json")):
            yield Finding.warning(
                f"{name}: {folder} cannot be written, so every node packs the data again into its temporary folder; "
                "run this once as a user who can write there"
            )

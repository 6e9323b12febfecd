"""Where checkpoints lie on disk and what is written beside the weights. Standard library and conf only: no torch.

    <run>/tokenizer/                          the tokenizer the weights were trained with
    <run>/checkpoints/step_00000100/          one step directory: a megatron torch_dist checkpoint ...
    <run>/checkpoints/step_00000100/checkpoint.json           ... and its CheckpointManifest
    <run>/checkpoints/step_00000100/SHA256SUMS                ... and the sums of all its files (checksums.py)
    <run>/checkpoints/step_00000200.partial/  being written (or left by a killed process); nobody reads it
    <run>/checkpoints/step_00000300.corrupt/  set aside because a file had changed since it was written

A step directory is renamed to its final name when everything in it is on disk, the sums last: a final name means a
complete checkpoint.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig, RopeConfig
from conf.system.atomic import PARTIAL_SUFFIX, atomic_write_text, fsync_tree, partial_path, publish_directory
from conf.system.errors import UserError
from model.checkpoint.checksums import SUMS_NAME, find_damage, write_sums

FORMAT_VERSION = 2
MANIFEST_NAME = "checkpoint.json"
CHECKPOINTS_FOLDER = "checkpoints"
CORRUPT_SUFFIX = ".corrupt"
TOKENIZER_FOLDER = "tokenizer"

_STEP_NAME = re.compile(r"step_(\d{8,})")
# Labels and claims: two models that differ in these compute the same thing from the same weights.
_NOT_THE_MODEL = frozenset({"name", "init_std", "max_position_embeddings"})


@dataclass
class CheckpointManifest:
    """What a checkpoint says about itself (checkpoint.json).

    step: optimizer steps done. tokens_seen: clean tokens trained on. samples_seen: sequences trained on.
    stage: name of the stage that wrote it (`import` for a converted checkpoint).
    block_size: tokens per diffusion block the weights were trained for; the export's default for decoding.
    model: asdict(ModelConfig). tokenizer: {fingerprint, mask_token_id, vocab_size}.
    data: fingerprint of the dataset, or {}. data_position: where each source is read on, or {}.
    config: the resolved configuration of the run, or {}. guard: what the loss guard remembers, or {}.
    eos_token_id: what the export declares as the end of an answer.
    export: keys of an imported Hugging Face config that ModelConfig does not hold but an export gives back.
    versions: package name -> version that wrote the checkpoint. dtype: `bfloat16` or `float32`, of the weights.
    """

    step: int
    tokens_seen: int
    samples_seen: int
    stage: str
    block_size: int
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    eos_token_id: int
    dtype: str
    data: dict[str, Any] = field(default_factory=dict)
    data_position: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    export: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def step_directory(run_dir: Path | str, step: int) -> Path:
    """Final path of the checkpoint after `step` optimizer steps."""
    return Path(run_dir) / CHECKPOINTS_FOLDER / f"step_{step:08d}"


def tokenizer_directory(run_dir: Path | str) -> Path:
    """Folder of the run's own copy of its tokenizer."""
    return Path(run_dir) / TOKENIZER_FOLDER


def partial_directory(step_dir: Path | str) -> Path:
    """Path under which a step directory is written until it is complete."""
    return partial_path(step_dir)


def run_directory_of(step_dir: Path | str) -> Path:
    """The run folder a step directory belongs to."""
    return Path(step_dir).resolve().parent.parent


def step_of(step_dir: Path | str) -> int:
    """Optimizer steps done, read from the directory's name. Raises: UserError if the name is not a step's."""
    match = _STEP_NAME.fullmatch(Path(step_dir).name)
    if match is None:
        raise UserError(f"{step_dir} is not named like a step directory (step_00000100)")
    return int(match[1])


def list_complete_steps(run_dir: Path | str) -> list[Path]:
    """Complete step directories of a run, oldest first. A run without checkpoints gives an empty list.

    One that has lost its manifest and kept its sums counts: it is damaged, and must not look as if it had never been.
    """
    folder = Path(run_dir) / CHECKPOINTS_FOLDER
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name)]
    marks = (MANIFEST_NAME, SUMS_NAME)
    return sorted((path for path in found if any((path / mark).is_file() for mark in marks)), key=step_of)


def find_newest_complete(run_dir: Path | str) -> Path | None:
    """The complete step directory with the most steps, or None."""
    steps = list_complete_steps(run_dir)
    return steps[-1] if steps else None


def list_set_aside(run_dir: Path | str) -> list[Path]:
    """Step directories of a run that were found damaged."""
    return sorted((Path(run_dir) / CHECKPOINTS_FOLDER).glob(f"step_*{CORRUPT_SUFFIX}"))


def set_aside(step_dir: Path) -> Path:
    """Take a damaged step directory out of the way of resuming, keeping it; an earlier one of its name is deleted."""
    target = step_dir.with_name(step_dir.name + CORRUPT_SUFFIX)
    publish_directory(step_dir, target)
    return target


def begin_step(partial: Path) -> None:
    """An empty folder, and nothing left of saves that were killed: they may never be written again."""
    for leftover in partial.parent.glob(f"step_*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)


def publish_step(partial: Path, final: Path, keep: int) -> None:
    """Sum the files of a complete step directory and give it its final name; the run's newest `keep` stay."""
    write_sums(partial)
    fsync_tree(partial)
    publish_directory(partial, final)
    for old in list_complete_steps(run_directory_of(final))[:-keep]:
        # Not in place: what is half deleted must not look like a checkpoint, and a file in use is no failed save.
        doomed = partial_path(old)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def resolve_checkpoint(path: Path | str) -> Path:
    """Step directory meant by `path`: itself, or the newest complete one of a run folder.

    Raises: UserError if there is no complete checkpoint at or below `path`.
    """
    path = Path(path)
    if path.name.endswith(PARTIAL_SUFFIX):
        raise UserError(f"{path} was never completed (the writer was stopped): use another step of the run")
    if (path / MANIFEST_NAME).is_file():
        return path
    newest = find_newest_complete(path)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint: expected {_what_is_missing(path)}")
    return newest


def check_intact(step_dir: Path) -> None:
    """Read every file of a step directory and compare its sum. Raises: UserError naming what has changed."""
    try:
        damage = find_damage(step_dir)
    except OSError as error:
        raise UserError(f"{step_dir} cannot be read: {error}. Mend that, then give the same command again.") from error
    if damage:
        raise UserError(f"{step_dir} is damaged: {damage}. Use another step of the run, or a copy of this one.")


def _what_is_missing(path: Path) -> str:
    if not path.exists():
        return "an existing run folder or step directory (nothing has this name)"
    ours = f"a run folder with {CHECKPOINTS_FOLDER}/step_*/{MANIFEST_NAME}, or one such step directory"
    return f"{ours}; a Hugging Face directory would have a config.json"


def save_manifest(directory: Path | str, manifest: CheckpointManifest) -> None:
    """Write checkpoint.json into `directory` (normally the partial directory, as its last file)."""
    atomic_write_text(Path(directory) / MANIFEST_NAME, json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")


def load_manifest(step_dir: Path | str) -> CheckpointManifest:
    """Read checkpoint.json of a step directory.

    Raises: UserError if it is missing, unreadable, of another format version, or lacks or adds a field.
    """
    path = Path(step_dir) / MANIFEST_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{step_dir} is not a complete checkpoint: it has no {MANIFEST_NAME}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): use another step of the run") from None
    found = values.get("format_version") if isinstance(values, dict) else None
    if found != FORMAT_VERSION:
        is_newer = isinstance(found, int) and found > FORMAT_VERSION
        remedy = "update the code" if is_newer else "use the version of the code that wrote it, or another checkpoint"
        age = "a newer" if is_newer else "another"
        raise UserError(
            f"{path} was written by {age} version of this program (format_version {found}; this one reads "
            f"{FORMAT_VERSION}): {remedy}."
        )
    return CheckpointManifest(**_exact_fields(CheckpointManifest, values, str(path)))


def model_config_from(values: dict[str, Any], where: str) -> ModelConfig:
    """ModelConfig from the `model` dictionary of a manifest. Raises: UserError if a field is missing or unknown.

    where: what the values were read from, for the message.
    """
    values = dict(_exact_fields(ModelConfig, values, f"model of {where}"))
    rope = _exact_fields(RopeConfig, values.pop("rope"), f"model.rope of {where}")
    return ModelConfig(**values, rope=RopeConfig(**rope))


def check_same_model(checkpoint: ModelConfig, requested: ModelConfig, where: str) -> None:
    """Refuse weights of another model. Names, init_std and max_position_embeddings may differ: they compute nothing.

    where: what `checkpoint` was read from. Raises: UserError listing every field that differs with both values.
    """
    ours, theirs = _flat(requested), _flat(checkpoint)
    differing = [f"  {key}: {theirs[key]} there, {ours[key]} requested" for key in ours if ours[key] != theirs[key]]
    if differing:
        listing = "\n".join(differing)
        raise UserError(
            f"{where} holds another model than the one requested:\n{listing}\n"
            "Choose the model group or the model.* overrides that match it, or another checkpoint."
        )


def _flat(model: ModelConfig) -> dict[str, Any]:
    """Fields that decide what the model computes, by the name used in overrides."""
    values = {f"model.{key}": value for key, value in asdict(model).items() if key not in _NOT_THE_MODEL}
    rope = values.pop("model.rope")
    return values | {f"model.rope.{key}": value for key, value in rope.items()}


def _exact_fields(cls: type, values: Any, where: str) -> dict[str, Any]:
    """`values` if it has exactly the fields of dataclass `cls`. Raises: UserError naming missing and unknown ones."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a JSON object")
    expected = {item.name for item in fields(cls)}
    missing, unknown = sorted(expected - values.keys()), sorted(values.keys() - expected)
    if missing or unknown:
        raise UserError(f"{where} does not fit this program: missing {missing}, unknown {unknown}")
    return values

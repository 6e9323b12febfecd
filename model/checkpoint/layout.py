"""Where checkpoints lie on disk and what stands next to the weights. Standard library and conf only: no torch.

    <run>/tokenizer/                          the tokenizer the weights were trained with
    <run>/checkpoints/step_00000100/          one step directory: a megatron torch_dist checkpoint ...
    <run>/checkpoints/step_00000100/checkpoint.json           ... and its CheckpointManifest
    <run>/checkpoints/step_00000100/SHA256SUMS                ... and the sums of all its files (checksums.py)
    <run>/checkpoints/step_00000200.partial/  being written, or left by a killed process; never read
    <run>/checkpoints/step_00000300.corrupt/  set aside because a file had changed since it was written

A step directory gets its final name when everything in it is on disk, the sums last: a final name means a complete
checkpoint.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from conf.schema import ModelConfig, RopeConfig, VisionConfig
from conf.system.atomic import PARTIAL_SUFFIX, atomic_write_text, fsync_tree, partial_path, publish_directory
from conf.system.errors import UserError
from model.checkpoint.checksums import SUMS_NAME, find_damage, write_sums

FORMAT_VERSION = 2
MANIFEST_NAME = "checkpoint.json"
CHECKPOINTS_FOLDER = "checkpoints"
CORRUPT_SUFFIX = ".corrupt"
TOKENIZER_FOLDER = "tokenizer"

_STEP_NAME = re.compile(r"step_(\d{8,})")
# Labels and limits: models that differ only in these compute the same from the same weights.
_NOT_THE_MODEL = frozenset({"name", "init_std", "max_position_embeddings"})


@dataclass
class CheckpointManifest:
    """The content of checkpoint.json: what a checkpoint states about itself.

    Attributes:
        step: optimizer steps done.
        tokens_seen: clean tokens trained on.
        samples_seen: sequences trained on.
        stage: name of the stage that wrote it (`import` for a converted checkpoint).
        block_size: tokens per diffusion block in training, which is the export's default for decoding.
        model: asdict(ModelConfig).
        tokenizer: {fingerprint, mask_token_id, vocab_size}.
        eos_token_id: what the export declares as the end of a response.
        dtype: `bfloat16` or `float32`, of the weights.
        data: fingerprint of the dataset, or {}.
        data_position: where reading continues in each source, or {}.
        config: the resolved configuration of the run, or {}.
        guard: state of the loss guard, or {}.
        export: keys of an imported Hugging Face config that ModelConfig does not hold but an export restores.
        versions: package name -> version that wrote the checkpoint.
        format_version: version of this format.
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
    """Return the final path of the checkpoint after `step` optimizer steps."""
    return Path(run_dir) / CHECKPOINTS_FOLDER / f"step_{step:08d}"


def tokenizer_directory(run_dir: Path | str) -> Path:
    """Return the folder of the run's own copy of its tokenizer."""
    return Path(run_dir) / TOKENIZER_FOLDER


def partial_directory(step_dir: Path | str) -> Path:
    """Return the path under which a step directory is written until it is complete."""
    return partial_path(step_dir)


def run_directory_of(step_dir: Path | str) -> Path:
    """Return the run folder that a step directory belongs to."""
    return Path(step_dir).resolve().parent.parent


def step_of(step_dir: Path | str) -> int:
    """Read the number of steps from a step directory's name. Raises: UserError if it is not such a name."""
    match = _STEP_NAME.fullmatch(Path(step_dir).name)
    if match is None:
        raise UserError(f"{step_dir} is not named like a step directory (step_00000100)")
    return int(match[1])


def list_complete_steps(run_dir: Path | str) -> list[Path]:
    """List the complete step directories of a run, oldest first; none if the run has no checkpoints.

    A directory that has lost its manifest but still has its sums is listed, too: it is damaged, not absent.
    """
    folder = Path(run_dir) / CHECKPOINTS_FOLDER
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name)]
    marks = (MANIFEST_NAME, SUMS_NAME)
    return sorted((path for path in found if any((path / mark).is_file() for mark in marks)), key=step_of)


def find_newest_complete(run_dir: Path | str) -> Path | None:
    """Return the complete step directory with the most steps, or None."""
    steps = list_complete_steps(run_dir)
    return steps[-1] if steps else None


def list_set_aside(run_dir: Path | str) -> list[Path]:
    """List the step directories of a run that were found damaged."""
    return sorted((Path(run_dir) / CHECKPOINTS_FOLDER).glob(f"step_*{CORRUPT_SUFFIX}"))


def set_aside(step_dir: Path) -> Path:
    """Rename a damaged step directory so that resuming ignores it; an earlier one of that name is deleted."""
    target = step_dir.with_name(step_dir.name + CORRUPT_SUFFIX)
    publish_directory(step_dir, target)
    return target


def begin_step(partial: Path) -> None:
    """Make an empty folder and delete what killed saves have left, which might never be written again."""
    for leftover in partial.parent.glob(f"step_*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)


def publish_step(partial: Path, final: Path, keep: int) -> None:
    """Sum the files of a complete step directory and give it its final name; only the newest `keep` remain."""
    write_sums(partial)
    fsync_tree(partial)
    publish_directory(partial, final)
    for old in list_complete_steps(run_directory_of(final))[:-keep]:
        # Rename first: a half-deleted folder must not look like a checkpoint. A file in use must not fail the save.
        doomed = partial_path(old)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def resolve_checkpoint(path: Path | str) -> Path:
    """Return the step directory that `path` means: itself, or the newest complete one of a run folder.

    Raises:
        UserError: there is no complete checkpoint at or below `path`.
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
    """Compare every file of a step directory with its sum. Raises: UserError naming what has changed."""
    try:
        damage = find_damage(step_dir)
    except OSError as error:
        raise UserError(f"{step_dir} cannot be read: {error}. Fix that, then give the same command again.") from error
    if damage:
        raise UserError(f"{step_dir} is damaged: {damage}. Use another step of the run, or a copy of this one.")


def _what_is_missing(path: Path) -> str:
    if not path.exists():
        return "an existing run folder or step directory (nothing has this name)"
    ours = f"a run folder with {CHECKPOINTS_FOLDER}/step_*/{MANIFEST_NAME}, or one such step directory"
    return f"{ours}; a Hugging Face directory would have a config.json"


def save_checkpoint_manifest(directory: Path | str, manifest: CheckpointManifest) -> None:
    """Write checkpoint.json into `directory` (normally the partial directory, as its last file)."""
    atomic_write_text(Path(directory) / MANIFEST_NAME, json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")


def load_checkpoint_manifest(step_dir: Path | str) -> CheckpointManifest:
    """Read checkpoint.json of a step directory.

    Raises:
        UserError: the file is missing, unreadable, of another format version, or lacks or adds a field.
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
    """Build ModelConfig from the `model` dictionary of a manifest. Raises: UserError if a field is missing or unknown.

    where: the source of the values, for the message.
    """
    if isinstance(values, dict):
        values = {"vision": None} | values  # manifests from before there were images do not name it
    values = dict(_exact_fields(ModelConfig, values, f"model of {where}"))
    rope = RopeConfig(**_exact_fields(RopeConfig, values.pop("rope"), f"model.rope of {where}"))
    vision = values.pop("vision")
    if vision is not None:
        vision = VisionConfig(**_exact_fields(VisionConfig, vision, f"model.vision of {where}"))
    return ModelConfig(**values, rope=rope, vision=vision)


def check_same_model(checkpoint: ModelConfig, requested: ModelConfig, where: str) -> None:
    """Refuse weights of another model; only name, init_std and max_position_embeddings may differ.

    Args:
        checkpoint: the model of the weights.
        requested: the model of the run.
        where: the source of `checkpoint`, for the message.

    Raises:
        UserError: lists every field that differs, with both values.
    """
    ours, theirs = _flat(requested), _flat(checkpoint)
    differing = [
        f"  {key}: {theirs[key]} there, {ours[key]} requested"
        for key in ours
        if key in theirs and ours[key] != theirs[key]
    ]
    if differing:
        listing = "\n".join(differing)
        raise UserError(
            f"{where} holds another model than the one requested:\n{listing}\n"
            "Choose the model group or the model.* overrides that match it, or another checkpoint."
        )


def _flat(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that decide what the model computes, by their names in overrides."""
    values = {f"model.{key}": value for key, value in asdict(model).items() if key not in _NOT_THE_MODEL}
    nested = {name: values.pop(f"model.{name}") or {} for name in ("rope", "vision")}
    has_vision = {"model.vision": "given" if model.vision else None}
    return (
        values | has_vision | {f"model.{name}.{key}": value for name in nested for key, value in nested[name].items()}
    )


def _exact_fields(cls: type, values: Any, where: str) -> dict[str, Any]:
    """Check that `values` has exactly the fields of a dataclass. Raises: UserError naming missing and unknown ones."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a JSON object")
    expected = {item.name for item in fields(cls)}
    missing, unknown = sorted(expected - values.keys()), sorted(values.keys() - expected)
    if missing or unknown:
        raise UserError(f"{where} does not fit this program: missing {missing}, unknown {unknown}")
    return values

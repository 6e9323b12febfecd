"""Converts in both directions: check everything, write under a temporary name, read back, rename.

Memory: one Megatron tensor and at most one of its parts; nothing that grows with the model.
"""

from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from conf.schema import ModelConfig
from conf.system.atomic import atomic_directory, refuse_used_path
from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info, token_text
from model.checkpoint import layout
from model.checkpoint.checksums import write_sums
from model.checkpoint.layout import CheckpointManifest
from model.convert import hf_target
from model.convert.checkpoint_info import CheckpointInfo, is_hf_directory, read_hf_checkpoint_info
from model.convert.dist_reader import DistReader
from model.convert.dist_writer import DistWriter
from model.convert.hf_config import read_hf_config
from model.convert.hf_source import HfSource
from model.convert.mapping import TensorEntry, build_tensor_table, count_table_parameters
from model.convert.nld_config import get_model_type
from model.convert.progress import Progress
from model.convert.safetensors_reader import DTYPES as STORED_DTYPES
from model.convert.safetensors_reader import SafetensorsReader, compute_checksum
from model.convert.safetensors_writer import SafetensorsWriter, TensorSpec

IMPORT_STAGE = "import"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Converted:
    """The size of a conversion.

    Attributes:
        tensors: tensors written.
        parameters: weights, head included.
        num_bytes: bytes of tensor data.
        skipped: entries of the source that are not weights of the model (image encoder, optimizer state).
    """

    tensors: int
    parameters: int
    num_bytes: int
    skipped: int


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Check that `source` can be read and `target` may be written. Raises: UserError.

    They must not overlap. With `overwrite`, only an earlier conversion is replaced.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a directory: give a Hugging Face directory, a run folder or a step directory")
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{target} and {source} overlap: choose another directory to write to")
    if not overwrite:
        refuse_used_path(target)
    elif target.exists() and any(target.iterdir()) and not _is_conversion(target):
        raise UserError(
            f"{target} does not look like an earlier conversion (a tri-mode export, or a run folder with nothing but "
            "an imported checkpoint): remove it yourself if you really want to replace it"
        )


def _is_conversion(target: Path) -> bool:
    """Return whether `target` holds nothing but a conversion, so that replacing it loses no work."""
    try:
        if is_hf_directory(target):
            return read_hf_config(target).is_nld
        stages = [layout.load_checkpoint_manifest(step).stage for step in layout.list_complete_steps(target)]
        return stages == [IMPORT_STAGE]
    except UserError:
        return False


def import_checkpoint(
    source_dir: Path,
    target: Path,
    mask_token: str,
    progress: Progress,
    *,
    dtype: torch.dtype | None = None,
    tensor_parallel: int = 1,
    replace: bool = False,
) -> Converted:
    """Convert a Hugging Face directory into a run folder with one checkpoint at step 0 and the tokenizer.

    Args:
        source_dir: Ministral 3 or tri-mode checkpoint.
        target: run folder to create.
        mask_token: text of the mask token.
        progress: follows the bytes.
        dtype: number format of the written weights; None takes the source's.
        tensor_parallel: see DistWriter.
        replace: replace what is at `target`.

    Raises:
        UserError: the source is not a complete checkpoint of this family; nothing has been written then.
    """
    info = read_hf_checkpoint_info(source_dir, mask_token)
    with HfSource(source_dir) as source, atomic_directory(target, replace=replace) as partial:
        table, dtype = source.table, dtype or source.dtype
        parameters = count_table_parameters(table)
        progress.start(2 * parameters * dtype.itemsize)
        hf_target.copy_tokenizer_files(source_dir, layout.tokenizer_directory(partial))
        step = layout.step_directory(partial, 0)
        step.mkdir(parents=True)
        with DistWriter(step, tensor_parallel) as writer:
            for entry in table:
                tensor = source.read(entry, dtype)
                writer.add(entry, tensor)
                progress.advance("writing", tensor.nbytes)
                del tensor  # before the next one is read
        verify_written_step(step, table, dtype, writer.checksums, progress)
        layout.save_checkpoint_manifest(step, build_import_manifest(info, dtype))
        write_sums(step)
        return Converted(len(table), parameters, parameters * dtype.itemsize, source.num_skipped)


def build_import_manifest(info: CheckpointInfo, dtype: torch.dtype) -> CheckpointManifest:
    """Build what a converted checkpoint says about itself."""
    return CheckpointManifest(
        step=0,
        tokens_seen=0,
        samples_seen=0,
        stage=IMPORT_STAGE,
        block_size=info.block_size,
        model=asdict(info.model),
        tokenizer=info.tokenizer,
        eos_token_id=info.eos_token_id,
        dtype=hf_target.DTYPE_WORDS[dtype],
        export=info.export,
        versions={name: metadata.version(name) for name in ("torch", "megatron-core")},
    )


def verify_written_step(
    step: Path, table: list[TensorEntry], dtype: torch.dtype, checksums: dict[str, int], progress: Progress
) -> None:
    """Read a written step directory back. Raises: UserError if names, shapes, formats or bytes differ."""
    reader = DistReader(step)
    reader.check(table, dtype)
    for entry in table:
        tensor = reader.read(entry.megatron)
        _compare(entry.megatron, tensor, checksums, step)
        progress.advance("checking", tensor.nbytes)
        del tensor


def export_checkpoint(
    checkpoint: Path,
    target: Path,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int,
    replace: bool = False,
) -> Converted:
    """Convert a run folder's newest checkpoint, or a step directory, into a tri-mode Hugging Face directory.

    Args:
        checkpoint: run folder or step directory.
        target: directory to create.
        progress: follows the bytes.
        dtype: number format of the exported weights.
        max_shard_bytes: most tensor bytes per file, unless one tensor is larger.
        replace: replace what is at `target`.

    Raises:
        UserError: the checkpoint is incomplete or its tokenizer is missing; nothing has been written then.
    """
    step = layout.resolve_checkpoint(checkpoint)
    manifest = layout.load_checkpoint_manifest(step)
    model = layout.model_config_from(manifest.model, str(step))
    table = build_tensor_table(model)
    reader = DistReader(step)
    reader.check(table)
    layout.check_intact(step)
    tokenizer = layout.tokenizer_directory(layout.run_directory_of(step))
    _check_tokenizer(tokenizer, manifest)
    specs = hf_target.build_specs(table, dtype)
    parameters = count_table_parameters(table)
    progress.start(2 * parameters * dtype.itemsize)
    with atomic_directory(target, replace=replace) as partial:
        hf_target.copy_tokenizer_files(tokenizer, partial)
        hf_target.write_portable_tokenizer_config(partial)
        hf_target.copy_code(partial, get_model_type(model))
        hf_target.write_config_files(partial, manifest, model, dtype)
        checksums = _write_tensors(partial, reader, table, specs, model, max_shard_bytes, progress)
        verify_written_export(partial, specs, checksums, progress)
        write_sums(partial)
    return Converted(len(specs), parameters, parameters * dtype.itemsize, reader.num_skipped)


def _write_tensors(
    directory: Path,
    reader: DistReader,
    table: list[TensorEntry],
    specs: list[TensorSpec],
    model: ModelConfig,
    max_shard_bytes: int,
    progress: Progress,
) -> dict[str, int]:
    with SafetensorsWriter(directory, specs, max_shard_bytes) as writer:
        for entry in table:
            fused = reader.read(entry.megatron)
            hf_target.add_entry(writer, entry, fused, model, specs[0].dtype)
            progress.advance("writing", fused.numel() * specs[0].dtype.itemsize)
            del fused
    return writer.checksums


def verify_written_export(
    directory: Path, specs: list[TensorSpec], checksums: dict[str, int], progress: Progress
) -> None:
    """Read a written export back. Raises: UserError if names, shapes, formats or bytes differ."""
    with SafetensorsReader(directory) as reader:
        found = {name: (record.shape, STORED_DTYPES[record.dtype]) for name, record in reader.records.items()}
        if found != {spec.name: (spec.shape, spec.dtype) for spec in specs}:
            raise UserError(f"{directory}: the written files lack or add tensors; the partial export was removed")
        for spec in specs:
            tensor = reader.read(spec.name)
            _compare(spec.name, tensor, checksums, directory)
            progress.advance("checking", tensor.nbytes)
            del tensor


def _compare(name: str, tensor: torch.Tensor, checksums: dict[str, int], directory: Path) -> None:
    if compute_checksum(tensor) != checksums[name]:
        raise UserError(
            f"{directory}: tensor {name} reads back differently from what was written; it was removed, check the disk"
        )


def _check_tokenizer(directory: Path, manifest: CheckpointManifest) -> None:
    """Check that the tokenizer is the one the checkpoint was trained with. Raises: UserError."""
    mask_token = token_text(directory, manifest.tokenizer["mask_token_id"])
    if read_tokenizer_info(directory, mask_token).fingerprint != manifest.tokenizer["fingerprint"]:
        raise UserError(
            f"{directory} is not the tokenizer the checkpoint was trained with (other fingerprint): put that one there"
        )

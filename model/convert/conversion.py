"""Both directions of a conversion: check everything, write under a temporary name, read back, rename.

Memory: one Megatron tensor, at most one of its parts, and nothing that grows with the model.
"""

from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from conf.schema import ModelConfig
from conf.system.atomic import atomic_directory
from conf.system.errors import UserError
from conf.tokenizer_info import read_tokenizer_info, token_text
from model.checkpoint import layout
from model.checkpoint.checksums import write_sums
from model.checkpoint.layout import CheckpointManifest
from model.convert import hf_target
from model.convert.dist_reader import DistReader
from model.convert.dist_writer import DistWriter
from model.convert.facts import CheckpointFacts, read_hf_facts
from model.convert.hf_source import HfSource
from model.convert.mapping import Entry, build_table, count_parameters
from model.convert.safetensors_reader import DTYPES, SafetensorsReader, compute_checksum
from model.convert.safetensors_writer import SafetensorsWriter, TensorSpec

IMPORT_STAGE = "import"


class Progress:
    """Told how a conversion gets on; this one keeps it to itself. Each byte counts twice: written, then read back."""

    def start(self, total_bytes: int) -> None:
        """Everything was checked; `total_bytes` are to be moved."""

    def advance(self, what: str, num_bytes: int) -> None:
        """One tensor more was dealt with. what: `writing` or `checking`."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did. tensors: written. parameters: weights, head included. num_bytes: of tensor data.

    skipped: entries of the source that are no weights of the model (image encoder, optimizer state).
    """

    tensors: int
    parameters: int
    num_bytes: int
    skipped: int


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
    """Hugging Face directory -> run folder with one checkpoint at step 0 and the tokenizer.

    dtype: of the written weights; default: the source's. tensor_parallel: see DistWriter.
    Raises: UserError, before anything is written, if the source is not a complete checkpoint of this family.
    """
    facts = read_hf_facts(source_dir, mask_token)
    with HfSource(source_dir) as source, atomic_directory(target, replace=replace) as partial:
        table, dtype = source.table, dtype or source.dtype
        parameters = count_parameters(table)
        progress.start(2 * parameters * dtype.itemsize)
        hf_target.copy_tokenizer(source_dir, layout.tokenizer_directory(partial))
        step = layout.step_directory(partial, 0)
        step.mkdir(parents=True)
        with DistWriter(step, tensor_parallel) as writer:
            for entry in table:
                tensor = source.read(entry, dtype)
                writer.add(entry, tensor)
                progress.advance("writing", tensor.nbytes)
                del tensor  # before the next one is read
        check_step(step, table, dtype, writer.checksums, progress)
        layout.save_manifest(step, _import_manifest(facts, dtype))
        write_sums(step)
        return Converted(len(table), parameters, parameters * dtype.itemsize, source.num_skipped)


def _import_manifest(facts: CheckpointFacts, dtype: torch.dtype) -> CheckpointManifest:
    return CheckpointManifest(
        step=0,
        tokens_seen=0,
        samples_seen=0,
        stage=IMPORT_STAGE,
        block_size=facts.block_size,
        model=asdict(facts.model),
        tokenizer=facts.tokenizer,
        eos_token_id=facts.eos_token_id,
        dtype=hf_target.DTYPE_WORDS[dtype],
        export=facts.export,
        versions={name: metadata.version(name) for name in ("torch", "megatron-core")},
    )


def check_step(
    step: Path, table: list[Entry], dtype: torch.dtype, checksums: dict[str, int], progress: Progress
) -> None:
    """Read a written step directory back. Raises: UserError if names, shapes, formats or bytes are not as written."""
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
    """Run folder (its newest checkpoint) or step directory -> Hugging Face directory in the tri-mode format.

    Raises: UserError, before anything is written, if the checkpoint is incomplete or its tokenizer is not there.
    """
    step = layout.resolve_checkpoint(checkpoint)
    manifest = layout.load_manifest(step)
    model = layout.model_config_from(manifest.model, str(step))
    table = build_table(model)
    reader = DistReader(step)
    reader.check(table)
    layout.check_intact(step)
    tokenizer = layout.tokenizer_directory(layout.run_directory_of(step))
    _check_tokenizer(tokenizer, manifest)
    specs = hf_target.build_specs(table, dtype)
    parameters = count_parameters(table)
    progress.start(2 * parameters * dtype.itemsize)
    with atomic_directory(target, replace=replace) as partial:
        hf_target.copy_tokenizer(tokenizer, partial)
        hf_target.copy_code(partial)
        hf_target.write_config_files(partial, manifest, model, dtype)
        checksums = _write_tensors(partial, reader, table, specs, model, max_shard_bytes, progress)
        check_export(partial, specs, checksums, progress)
        write_sums(partial)
    return Converted(len(specs), parameters, parameters * dtype.itemsize, reader.num_skipped)


def _write_tensors(
    directory: Path,
    reader: DistReader,
    table: list[Entry],
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


def check_export(directory: Path, specs: list[TensorSpec], checksums: dict[str, int], progress: Progress) -> None:
    """Read a written export back. Raises: UserError if names, shapes, formats or bytes are not as written."""
    with SafetensorsReader(directory) as reader:
        found = {name: (record.shape, DTYPES[record.dtype]) for name, record in reader.records.items()}
        if found != {spec.name: (spec.shape, spec.dtype) for spec in specs}:
            raise UserError(f"{directory}: the written files do not hold the tensors they should; nothing was kept")
        for spec in specs:
            tensor = reader.read(spec.name)
            _compare(spec.name, tensor, checksums, directory)
            progress.advance("checking", tensor.nbytes)
            del tensor


def _compare(name: str, tensor: torch.Tensor, checksums: dict[str, int], directory: Path) -> None:
    if compute_checksum(tensor) != checksums[name]:
        raise UserError(
            f"{directory}: tensor {name} reads back differently from what was written; nothing was kept, check the disk"
        )


def _check_tokenizer(directory: Path, manifest: CheckpointManifest) -> None:
    """The tokenizer folder must be the one the checkpoint was trained with."""
    mask_token = token_text(directory, manifest.tokenizer["mask_token_id"])
    if read_tokenizer_info(directory, mask_token).fingerprint != manifest.tokenizer["fingerprint"]:
        raise UserError(
            f"{directory} is not the tokenizer the checkpoint was trained with (other fingerprint): put that one there"
        )

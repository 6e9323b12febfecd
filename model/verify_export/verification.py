"""Runs all checks of an export, in the order in which they are printed. Code in it is read, never executed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from model.checkpoint.checksums import save_sums
from model.convert.hf_config import HfConfig
from model.convert.hf_target import TOKENIZER_CONFIG_NAME
from model.export.adapter_weights import WEIGHTS_FILE
from model.export.draft_adapter import ADAPTER_FOLDER
from model.export.shipped_code import CLASS_PREFIXES, VLM_TYPE
from model.verify_export import configuration, directory, images, remote_code, tokenizer, weights
from model.verify_export.check import CheckOutcome, ExportCheck

NO_CONFIG = "config.json cannot be used"


@dataclass
class ExportVerification:
    """The results of verifying an export.

    Attributes:
        directory: the export.
        checks: in the order in which they are printed.
        sums: sha256 of every file.
        properties: what the export states about itself, for the report.
    """

    directory: Path
    checks: list[ExportCheck] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)

    @property
    def has_failed(self) -> bool:
        """Whether any check failed."""
        return any(check.outcome is CheckOutcome.failed for check in self.checks)

    @property
    def has_warned(self) -> bool:
        """Whether any check warned."""
        return any(check.outcome is CheckOutcome.warned for check in self.checks)


def verify_export(export: Path, *, read_values: bool = True, record_sums: bool = False) -> ExportVerification:
    """Check a directory in the exported format, ours or a released one.

    Memory: about 50 MB above the imports, however large the export.

    Args:
        export: its folder.
        read_values: look for NaN and infinity in every tensor, which reads the weights once more.
        record_sums: if no check fails, write SHA256SUMS where the export or its adapter has none.

    Raises:
        UserError: `export` is not such a directory at all.
        OSError: a file cannot be read.
    """
    directory.refuse_non_export(export)
    result = ExportVerification(export)
    files = directory.list_export(export)
    result.checks += [directory.check_strays(files)]
    if files.specials:
        result.checks.append(ExportCheck.skipped("content", "not read: there are files that are not regular"))
    else:
        result.checks += _check_content(result, files, read_values)
    sums = directory.read_all_sums(files)
    if record_sums and not result.has_failed:
        sums, files = _record_sums(files, sums)
    result.checks.insert(0, directory.check_sums(files, sums))
    result.sums = dict(sums.now)
    return result


def _record_sums(files: directory.Files, sums: directory.Sums) -> tuple[directory.Sums, directory.Files]:
    for folder in directory.find_unsummed_folders(files, sums):
        save_sums(files.directory / folder, directory.new_sums(files, sums, folder))
    files = directory.list_export(files.directory)
    return directory.read_all_sums(files), files


def _check_content(result: ExportVerification, files: directory.Files, read_values: bool) -> Iterator[ExportCheck]:
    yield remote_code.check_origin(files.directory, files.names)
    try:
        config = configuration.read_config(files.directory)
    except UserError as error:
        yield ExportCheck.failed("config keys", str(error))
        config = {}
    if config and config.get("model_type") not in CLASS_PREFIXES:
        raise UserError(f"{files.directory} is not a tri-mode checkpoint: model_type is {config.get('model_type')!r}")
    hf = None
    if config:
        yield remote_code.check_auto_map(files.directory, config)
        yield remote_code.check_versions(files.directory, config, _read_tokenizer_config(files.directory))
        yield configuration.check_keys(config)
        model_check, hf = configuration.check_model(files.directory, config)
        yield model_check
        yield configuration.check_generation_config(files.directory, config)
        yield configuration.check_denoising(files.directory, config)
    if hf is not None:
        yield configuration.check_positions(hf)
        result.properties |= {"layers": hf.model.num_layers, "block_size": config.get("block_size")}
    yield from _check_tokenizer(result, files.directory, config)
    yield from _check_weights(result, files, config, hf, read_values)
    if (files.directory / ADAPTER_FOLDER).is_dir() and ADAPTER_FOLDER not in files.adapters:
        yield ExportCheck.failed(
            f"adapter {ADAPTER_FOLDER}", "the folder holds no adapter", "remove it, or put the adapter there"
        )
    for folder in files.adapters:
        name = f"adapter {folder}"
        yield (
            weights.check_draft_adapter(files.directory, folder, config)
            if hf is not None
            else ExportCheck.skipped(name, NO_CONFIG)
        )


def _check_tokenizer(result: ExportVerification, export: Path, config: dict[str, Any]) -> Iterator[ExportCheck]:
    vocab_size = config.get("vocab_size")
    check, loaded = tokenizer.check_tokenizer(export, vocab_size if isinstance(vocab_size, int) else None)
    yield check
    if loaded is None:
        return
    mask, info = tokenizer.check_mask_token(export, config)
    yield mask
    if info is not None:
        result.properties |= {"mask_token_id": info.mask_token_id, "tokenizer_fingerprint": info.fingerprint}
    stop_ids = configuration.read_stop_ids(export, config)
    eos_token_id = None if info is None else info.eos_token_id
    yield tokenizer.check_special_ids(loaded, config, stop_ids | configuration.stop_ids_of(config), eos_token_id)
    yield tokenizer.check_chat_template(loaded, stop_ids)
    if config.get("model_type") == VLM_TYPE:
        yield images.check_vision_tokens(export, loaded)
        yield images.check_processor(export, config)
    code = remote_code.check_tokenizer_code(_read_tokenizer_config(export))
    if code is not None:
        yield code


def _read_tokenizer_config(export: Path) -> dict[str, Any]:
    return configuration.read_if_there(export / TOKENIZER_CONFIG_NAME)


def _check_weights(
    result: ExportVerification, files: directory.Files, config: dict[str, Any], hf: HfConfig | None, read_values: bool
) -> Iterator[ExportCheck]:
    check, records = weights.check_weight_files(files.directory)
    yield check
    if records is None:
        return
    if hf is None:
        yield ExportCheck.skipped("tensor names", NO_CONFIG)
    else:
        yield weights.check_names(records, hf.model)
        yield weights.check_shapes(records, hf.model)
        yield weights.check_dtypes(records, config)
    result.properties |= {"tensors": len(records), "formats": sorted({record.dtype for record in records.values()})}
    adapters = [files.directory / folder / WEIGHTS_FILE for folder in files.adapters]
    paths = sorted({record.path for record in records.values()}) + [path for path in adapters if path.is_file()]
    yield weights.check_values(paths) if read_values else ExportCheck.skipped("values", "--skip-values")

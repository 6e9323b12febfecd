"""Convert a checkpoint between Hugging Face and Megatron: `python -m model.convert --from X --to Y`.

The direction follows from what FROM is: a Hugging Face directory (Ministral 3 or tri-mode) becomes a run folder with
one checkpoint and its tokenizer; a run folder or step directory becomes a tri-mode Hugging Face directory.

`python -m model.convert --from X --vision V --to Y` gives the text model in X the vision tower of the Ministral 3
checkpoint V: Y becomes a tri-mode Hugging Face directory that reads images, for the stage that trains it.

`python -m model.convert --refresh DIR` brings an export that an earlier version wrote up to date: its code, what
tokenizer_config.json says to other versions of transformers, and SHA256SUMS. The weights stay.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from conf.rules.layout import check_layout
from conf.schema import DataConfig, ParallelConfig
from conf.system.entry import exit_status
from conf.system.errors import UserError
from model.convert.progress import show_progress
from model.export.draft_adapter import ADAPTER_FOLDER

if TYPE_CHECKING:
    from model.convert.conversion import Converted

DTYPE_NAMES = ("bf16", "fp32")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
DEFAULT_SHARD_SIZE = "5GB"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 2 after an error message, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    run = _convert if options.refresh is None else _refresh
    return exit_status(lambda: run(options), interrupted="interrupted: partial results were removed")


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m model.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", help="Hugging Face directory, run folder or step")
    parser.add_argument("--vision", type=Path, help="Ministral 3 directory whose vision tower the text model gets")
    parser.add_argument("--to", dest="target", help="directory to create")
    parser.add_argument("--refresh", type=Path, metavar="DIR", help="instead of --from and --to: an export to refresh")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion at --to")
    parser.add_argument(
        "--dtype", choices=DTYPE_NAMES, help="format of the written weights; default: import as is, export bf16"
    )
    parser.add_argument(
        "--parallel",
        nargs="+",
        metavar="KEY=VALUE",
        help="import: cut tensors for this layout, such as tensor_parallel=2; any layout loads the result",
    )
    parser.add_argument("--mask-token", help=f"import: text of the mask token (default {DataConfig.mask_token})")
    parser.add_argument("--max-shard-size", help=f"export: for example 500MB (default {DEFAULT_SHARD_SIZE})")
    return parser


def _refresh(options: argparse.Namespace) -> None:
    from model.convert.refresh import refresh_export

    others = [name for name, value in vars(options).items() if value and name != "refresh"]
    if others:
        option = {"source": "from", "target": "to"}.get(others[0], others[0].replace("_", "-"))
        raise UserError(f"--{option} has no effect beside --refresh: leave one of them out")
    try:
        changed = refresh_export(options.refresh)
    except OSError as error:
        raise UserError(f"cannot write {options.refresh}: {error}; it is as before") from error
    files = {"wrote": changed.written, "removed": changed.removed}
    done = [f"{what} {', '.join(names)}" for what, names in files.items() if names]
    print(f"{options.refresh}: {'; '.join(done) or 'nothing to refresh'}; the weights are untouched")


def _convert(options: argparse.Namespace) -> None:
    from model.convert.checkpoint_info import is_hf_directory
    from model.convert.conversion import check_target

    if options.source is None or options.target is None:
        raise UserError("give --from and --to, or --refresh with the folder of an export")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    source, target = Path(options.source), Path(options.target)
    begin = time.monotonic()
    try:
        check_target(source, target, options.overwrite)
        # Weights without a config.json are a damaged Hugging Face directory, which the import reports.
        is_import = is_hf_directory(source) or any(source.glob("*.safetensors"))
        if options.vision is not None:
            check_target(options.vision, target, options.overwrite)
            converted = _merge(options, console, is_import)
        else:
            converted = _import(options, console) if is_import else _export(options, console)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}; partial results were removed") from error
    console.print(_summary(source, target, converted, time.monotonic() - begin))


def _import(options: argparse.Namespace, console: Console) -> "Converted":
    from model.convert.conversion import DTYPES, import_checkpoint
    from model.convert.hf_config import read_hf_config

    _refuse_options(options, "max_shard_size", "an imported checkpoint has no such shards")
    mask_token = options.mask_token or DataConfig.mask_token
    parallel = read_layout(options.parallel) if options.parallel else ParallelConfig()
    check_layout(read_hf_config(options.source).model, parallel)
    _note_adapter(options, console)
    with show_progress(console) as progress:
        return import_checkpoint(
            Path(options.source),
            Path(options.target),
            mask_token,
            progress,
            dtype=DTYPES.get(options.dtype),
            tensor_parallel=parallel.tensor_parallel,
            replace=options.overwrite,
        )


def _export(options: argparse.Namespace, console: Console) -> "Converted":
    from model.convert.conversion import DTYPES, export_checkpoint

    _refuse_options(options, "parallel", "an export has no layout")
    _refuse_options(options, "mask_token", "the checkpoint knows its mask token")
    with show_progress(console) as progress:
        return export_checkpoint(
            Path(options.source),
            Path(options.target),
            progress,
            dtype=DTYPES[options.dtype or "bf16"],
            max_shard_bytes=parse_size(options.max_shard_size or DEFAULT_SHARD_SIZE),
            replace=options.overwrite,
        )


def _merge(options: argparse.Namespace, console: Console, is_hf: bool) -> "Converted":
    from model.convert.conversion import DTYPES
    from model.convert.merge import merge_checkpoints

    if not is_hf:
        raise UserError(
            f"--vision needs a Hugging Face directory as --from: export {options.source} first "
            f"(python -m model.convert --from {options.source} --to DIR)"
        )
    _refuse_options(options, "parallel", "the result is a Hugging Face directory, which has no layout")
    _note_adapter(options, console)
    with show_progress(console) as progress:
        return merge_checkpoints(
            Path(options.source),
            options.vision,
            Path(options.target),
            options.mask_token or DataConfig.mask_token,
            progress,
            dtype=DTYPES[options.dtype or "bf16"],
            max_shard_bytes=parse_size(options.max_shard_size or DEFAULT_SHARD_SIZE),
            replace_target=options.overwrite,
        )


def _note_adapter(options: argparse.Namespace, console: Console) -> None:
    if (Path(options.source) / ADAPTER_FOLDER).is_dir():
        console.print(f"note: the draft adapter in {ADAPTER_FOLDER}/ is not converted; it only fits the export")


def _refuse_options(options: argparse.Namespace, name: str, reason: str) -> None:
    if getattr(options, name) is not None:
        raise UserError(f"--{name.replace('_', '-')} has no effect here ({reason}): leave it out")


def parse_size(text: str) -> int:
    """Return the bytes of `5GB`, `500MB`, `20KB` or a plain number. Raises: UserError."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B|)", text.upper())
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max-shard-size {text!r} is not a size: write for example 5GB or 500MB")
    return int(match[1]) * UNITS[match[2]]


def read_layout(words: list[str]) -> ParallelConfig:
    """Read a layout given as keys of `parallel`. Raises: UserError naming the nearest key."""
    from conf.composition.compose import compose_layout  # Hydra takes half a second, and only an import needs it

    return compose_layout(words)


def _summary(source: Path, target: Path, converted: "Converted", seconds: float) -> str:
    skipped = f", {converted.skipped} entries skipped that are not model weights" if converted.skipped else ""
    return (
        f"{source} -> {target}: {converted.tensors} tensors, {converted.parameters:,} parameters, "
        f"{converted.num_bytes / 1e9:.3f} GB, {seconds:.1f} s, peak memory {peak_resident_bytes() / 1e9:.3f} GB; "
        f"read back and compared{skipped}"
    )


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far, imports included (Linux)."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the command lines of model.evaluate and lora.evaluate share.

Torch and transformers are imported when a checkpoint is loaded, not before.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from conf.schema.drafter import ResponsesConfig
from conf.system.entry import OneLineParser, count
from conf.system.errors import UserError
from model.commands.decoding_options import add_length_options, add_place_options
from model.evaluate.options import EvaluationOptions
from model.export.draft_adapter import ADAPTER_FOLDER, check_trained_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from model.evaluate.prompts import EvaluationPrompt

EXIT_DIFFERENCE = 1
DEFAULTS = EvaluationOptions()
DEFAULT_PROMPT_TOKENS = ResponsesConfig.prompt_tokens  # as in training the drafter
PROMPT_FORMAT = """prompts, one JSON object per line:
  {"prompt": "def fibonacci("}              encoded as it is, reserved tokens in it included
  {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
                                            through the chat template; a response at the end is left out
  {"messages": [{"role": "user", "content": [
      {"type": "image_url", "image_url": {"url": "picture.png"}}, {"type": "text", "text": "What is this?"}]}]}
                                            with images: paths beside the file, data: addresses or base64
  {"images": ["picture.png"], "texts": [{"user": "What is this?"}]}
                                            the same as FineVision has it; "images" may stand beside all but "text"
  {"text": "..."}                           its first tokens (--prompt-tokens) are continued
  "group": "code"                           optional: the group it is reported under; default: the file's name
"""


@dataclass(frozen=True)
class Loaded:
    """A loaded checkpoint, its adapter attached if one was given, with its tokenizer and the encoded prompts."""

    model: Any
    tokenizer: "PreTrainedTokenizerFast"
    prompts: list["EvaluationPrompt"]


def make_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Make a parser with EXPORT as its only argument, which reports errors in one line."""
    parser = OneLineParser(
        prog=program,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="checkpoint in the exported format")
    return parser


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add --prompts, --limit and --prompt-tokens."""
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl files")
    parser.add_argument("--limit", type=count, metavar="N", help="only the first N prompts of each group")
    parser.add_argument(
        "--prompt-tokens",
        type=count,
        default=DEFAULT_PROMPT_TOKENS,
        metavar="N",
        help='tokens of a "text" that are the prompt; default: %(default)s',
    )


def add_decoding_options(group: argparse._ArgumentGroup) -> None:
    """Add --max-new-tokens, --block-length, --device and --dtype."""
    add_length_options(group, DEFAULTS.max_new_tokens)
    add_place_options(group)


def add_report_options(group: argparse._ArgumentGroup, report: str, pictures: str) -> None:
    """Add --output, --resamples and --json. report, pictures: the file names to mention in the help."""
    group.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder for {report} and {pictures}; default: EXPORT-evaluation"
    )
    group.add_argument(
        "--resamples",
        type=count,
        default=DEFAULTS.resamples,
        metavar="N",
        help="bootstrap resamples for confidence intervals; default: %(default)s",
    )
    group.add_argument("--json", action="store_true", help=f"print {report} instead of tables")


def choose_output(export: Path, output: Path | None) -> Path:
    """Choose the folder of the report. Raises: UserError if it is a file, unwritable, or inside the checkpoint."""
    export = export.resolve()
    chosen = export.with_name(f"{export.name}-evaluation") if output is None else output
    if chosen.resolve().is_relative_to(export):
        raise UserError(f"--output {chosen} is inside the checkpoint: choose a folder outside of it")
    if chosen.exists() and not chosen.is_dir():
        raise UserError(f"--output {chosen} is a file: choose a folder")
    _check_writable(chosen)
    return chosen


def _check_writable(folder: Path) -> None:
    """Check before anything is measured that the folder can be written. Raises: UserError."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error.strerror}; choose another folder") from None


def choose_adapter(export: Path, adapter: Path | None) -> Path:
    """Return the adapter named, else the checkpoint's own. Raises: UserError if there is neither."""
    if adapter is not None:
        return adapter
    folder = export / ADAPTER_FOLDER
    if export.is_dir() and not folder.is_dir():
        raise UserError(f"{export} has no {ADAPTER_FOLDER}/: train one (python -m lora.train), or use --adapter")
    return folder


def load(options: argparse.Namespace, adapter: Path | None) -> Loaded:
    """Load the model, tokenizer and prompts that the options name; everything small is checked before the weights.

    Args:
        options: the parsed command line.
        adapter: draft adapter to attach, if any.

    Raises:
        UserError: something given cannot be used.
    """
    from model.evaluate.prompts import check_choices, check_masks, check_room, read_prompts
    from model.export.images import load_image_reader
    from model.export.load import (
        attach_adapter,
        check_export,
        check_vocabulary,
        load_config,
        load_export,
        load_export_tokenizer,
    )

    check_export(options.export)
    tokenizer = load_export_tokenizer(options.export)
    prompts = read_prompts(
        options.prompts,
        tokenizer,
        prompt_tokens=options.prompt_tokens,
        limit=options.limit,
        read_image=load_image_reader(options.export, tokenizer),
    )
    config = load_config(options.export)
    check_vocabulary(options.export, tokenizer, config.vocab_size)
    check_room(prompts, options.max_new_tokens, config.max_position_embeddings)
    check_choices(prompts, options.block_length or config.block_size, config.max_position_embeddings)
    check_masks(prompts, config.mask_token_id)
    if adapter is not None:
        check_trained_for(adapter, options.export)
    model: Any = load_export(options.export, dtype=options.dtype, device=options.device)
    if adapter is not None:
        attach_adapter(model, adapter)
    return Loaded(model, tokenizer, prompts)


def describe_inputs(options: argparse.Namespace, adapter: Path | None, packages: Sequence[str]) -> dict[str, Any]:
    """Describe what was evaluated, for the report. packages: those whose versions are recorded."""
    return {
        "checkpoint": str(options.export),
        "adapter": None if adapter is None else str(adapter),
        "prompt_files": [str(path) for path in options.prompts],
        "prompt_tokens": options.prompt_tokens,
        "limit": options.limit,
        "versions": {name: version(name) for name in packages},
    }


def publish(
    options: argparse.Namespace,
    report: dict[str, Any],
    tables: Iterable[RenderableType],
    save: Callable[[], None],
    where: str,
) -> None:
    """Print the tables (with --json the report and nothing else), then save the files.

    Args:
        options: the parsed command line.
        report: what --json prints.
        tables: what is printed otherwise.
        save: writes the files.
        where: a line that says where they are.

    Raises:
        UserError: the files cannot be written.
    """
    console = Console(highlight=False)
    if options.json:
        print(json.dumps(report, indent=2), flush=True)
    else:
        console.print(*tables)
    try:
        save()
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}; choose another --output") from error
    if not options.json:
        console.print(where, soft_wrap=True)


def track(jobs: Sequence[Any], description: str = "decoding") -> Iterator[Any]:
    """Yield the jobs and show a progress bar on standard error, which disappears at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(jobs, description=description)


def report_differences(differences: Sequence[tuple[str, str]]) -> int:
    """Report where speculation was not lossless; return the exit status. differences: place and mode."""
    if not differences:
        return 0
    place, mode = differences[0]
    print(
        f"error: {len(differences)} outputs of self-speculation are not greedy AR's, the first one at {place} in mode "
        f"{mode}: the device computes wrongly, or this is a bug; please report it",
        file=sys.stderr,
    )
    return EXIT_DIFFERENCE

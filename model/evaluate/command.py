"""What the command lines of evaluations share. Torch and transformers are imported once a checkpoint is to be read."""

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

from conf.schema.drafter import AnswersConfig
from conf.system.entry import OneLineParser, count
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from model.evaluate.options import EvaluationOptions
from model.export.command_options import add_length_options, add_place_options
from model.export.draft_adapter import ADAPTER_FOLDER, RECORD_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from model.evaluate.records import Prompt

EXIT_DIFFERENCE = 1
DEFAULTS = EvaluationOptions()
DEFAULT_PROMPT_TOKENS = AnswersConfig.prompt_tokens  # those a model is trained to answer, unless told otherwise
PROMPT_ROWS = """prompts, one JSON object per line:
  {"prompt": "def fibonacci("}              encoded as it is, reserved tokens in it included
  {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
                                            through the chat template; an answer at the end is left out
  {"text": "..."}                           its first tokens (--prompt-tokens) are continued
  "group": "code"                           besides, sorts them; without it the name of the file does
"""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint on its device, with the adapter attached if one was given, and the prompts in its tokens."""

    model: Any
    tokenizer: "PreTrainedTokenizerFast"
    prompts: list["Prompt"]


def make_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """With EXPORT as its only argument so far; errors are one line."""
    parser = OneLineParser(
        prog=program,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="checkpoint in the exported format")
    return parser


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """--prompts, --limit, --prompt-tokens."""
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl files")
    parser.add_argument("--limit", type=count, metavar="N", help="at most N prompts of each group, the first ones")
    parser.add_argument(
        "--prompt-tokens",
        type=count,
        default=DEFAULT_PROMPT_TOKENS,
        metavar="N",
        help="of a text; default: %(default)s",
    )


def add_decoding_options(group: argparse._ArgumentGroup) -> None:
    """--max-new-tokens, --block-length, --device, --dtype."""
    add_length_options(group, DEFAULTS.max_new_tokens)
    add_place_options(group)


def add_report_options(group: argparse._ArgumentGroup, report: str, pictures: str) -> None:
    """--output, --resamples, --json. report, pictures: names of the files."""
    group.add_argument(
        "--output", type=Path, metavar="DIR", help=f"of {report} and {pictures}; default: EXPORT-evaluation"
    )
    group.add_argument(
        "--resamples",
        type=count,
        default=DEFAULTS.resamples,
        metavar="N",
        help="of the prompts, for the confidence interval; default: %(default)s",
    )
    group.add_argument("--json", action="store_true", help=f"print {report} instead of the table")


def choose_output(export: Path, output: Path | None) -> Path:
    """The folder of the report. Raises: UserError if it is a file or lies in the checkpoint, which stays as it is."""
    export = export.resolve()
    chosen = export.with_name(f"{export.name}-evaluation") if output is None else output
    if chosen.resolve().is_relative_to(export):
        raise UserError(f"--output {chosen} lies in the checkpoint: choose a folder outside of it")
    if chosen.exists() and not chosen.is_dir():
        raise UserError(f"--output {chosen} is a file: choose a folder")
    _check_writable(chosen)
    return chosen


def _check_writable(folder: Path) -> None:
    """Raises: UserError now rather than when everything has been measured."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with TemporaryDirectory(dir=there):
            pass
    except OSError as error:
        raise UserError(f"nothing can be written to --output {folder}: {error.strerror}; choose another") from None


def choose_adapter(export: Path, adapter: Path | None) -> Path:
    """The adapter named, else the checkpoint's own. Raises: UserError if neither is there."""
    if adapter is not None:
        return adapter
    folder = export / ADAPTER_FOLDER
    if export.is_dir() and not folder.is_dir():
        raise UserError(f"{export} has no {ADAPTER_FOLDER}/: train one (python -m lora.train), or use --adapter")
    return folder


def load(options: argparse.Namespace, adapter: Path | None) -> Loaded:
    """What the options above name; prompts and small files are checked before weights are read.

    adapter: to attach, if any.

    Raises: UserError if something given cannot work.
    """
    from model.evaluate.prompts import check_masks, check_room, read_prompts
    from model.export.load import (
        attach_adapter,
        check_export,
        check_vocabulary,
        load_config,
        load_export,
        load_tokenizer,
    )

    check_export(options.export)
    tokenizer = load_tokenizer(options.export)
    prompts = read_prompts(options.prompts, tokenizer, prompt_tokens=options.prompt_tokens, limit=options.limit)
    config = load_config(options.export)
    check_vocabulary(options.export, tokenizer, config.vocab_size)
    check_room(prompts, options.max_new_tokens, config.max_position_embeddings)
    check_masks(prompts, config.mask_token_id)
    if adapter is not None:
        check_trained_for(adapter, options.export)
    model: Any = load_export(options.export, dtype=options.dtype, device=options.device)
    if adapter is not None:
        attach_adapter(model, adapter)
    return Loaded(model, tokenizer, prompts)


def check_trained_for(adapter: Path, export: Path) -> None:
    """Raises: UserError if `adapter` says that it was trained for other weights; not every adapter says."""
    from model.checkpoint.identity import identify_checkpoint

    path = adapter / RECORD_FILE
    if not path.is_file():
        return
    trained_for = read_json_object(path, f"{path} has gone").get("checkpoint")
    if trained_for not in (None, identify_checkpoint(export)):
        raise UserError(
            f"the draft adapter in {adapter} was trained for another checkpoint than {export}: train one for this one "
            f"(python -m lora.train). If the same weights only lie in other files, remove {path}"
        )


def describe_inputs(options: argparse.Namespace, adapter: Path | None, packages: Sequence[str]) -> dict[str, Any]:
    """What was evaluated, for the report. packages: whose versions are told."""
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
    """Print the tables (with --json the report and nothing else), then save. where: a line about what was saved.

    Raises: UserError if it cannot be saved.
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
    """A progress bar on standard error, gone when all is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(jobs, description=description)


def report_differences(differences: Sequence[tuple[str, str]]) -> int:
    """The exit status; says where speculation was not lossless. differences: place and mode."""
    if not differences:
        return 0
    place, mode = differences[0]
    print(
        f"error: {len(differences)} outputs of self-speculation are not greedy AR's, the first one at {place} in mode "
        f"{mode}: the device computes wrongly, or this is a defect; please report it",
        file=sys.stderr,
    )
    return EXIT_DIFFERENCE

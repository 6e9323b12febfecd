"""What a draft adapter gains on your prompts: `python -m lora.evaluate EXPORT --prompts FILE.jsonl [FILE ...]`.

Torch and transformers are imported once the options are known to be right.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from conf.entry import OneLineParser, count, exit_status, quiet_libraries
from conf.errors import UserError
from conf.json_file import read_json_object
from conf.schema.drafter import AnswersConfig
from lora.evaluation.options import EvaluationOptions
from model.draft_adapter import ADAPTER_FOLDER

if TYPE_CHECKING:
    from lora.evaluation.evaluate import Evaluation
    from lora.evaluation.records import Prompt

EXIT_DIFFERENCE = 1
PACKAGES = ("torch", "transformers", "peft")
DEFAULTS = EvaluationOptions()
DEFAULT_PROMPT_TOKENS = AnswersConfig.prompt_tokens  # those a model is trained to answer, unless told otherwise
EXAMPLES = """examples:
  # a checkpoint with its own adapter, two groups of prompts
  python -m lora.evaluate exports/nld_8b_sft --prompts code.jsonl mathematics.jsonl

  # another adapter, a quick look
  python -m lora.evaluate exports/nld_8b_sft --adapter runs/drafter/adapter --prompts chats.jsonl --limit 20

prompts, one JSON object per line:
  {"prompt": "def fibonacci("}              encoded as it is, reserved tokens in it included
  {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
                                            through the chat template; an answer at the end is left out
  {"text": "..."}                           its first tokens (--prompt-tokens) are continued
  "group": "code"                           besides, sorts them; without it the name of the file does

Every prompt is decoded greedily three times: autoregressively, and by linear self-speculation without and with the
adapter. Exit status 1 if speculation does not give AR's tokens (in fp32; bf16 promises nothing and is only counted).
Code in the checkpoint's directory is not executed.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 if outputs differ from AR's, 2 after one message, 130."""
    options = build_parser().parse_args(arguments)
    return exit_status(lambda: run(options))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="python -m lora.evaluate",
        description="Measure what a draft adapter gains: tokens per forward with and without it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="checkpoint in the exported format")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help=f"default: EXPORT/{ADAPTER_FOLDER}")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, metavar="FILE", help=".jsonl files")
    parser.add_argument("--limit", type=count, metavar="N", help="at most N prompts of each group, the first ones")
    parser.add_argument(
        "--prompt-tokens",
        type=count,
        default=DEFAULT_PROMPT_TOKENS,
        metavar="N",
        help="of a text; default: %(default)s",
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument(
        "--max-new-tokens", type=count, default=DEFAULTS.max_new_tokens, metavar="N", help="default: %(default)s"
    )
    decoding.add_argument(
        "--block-length", type=block_length, metavar="N", help="default: block_size of the checkpoint"
    )
    decoding.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    decoding.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    report = parser.add_argument_group("report")
    report.add_argument(
        "--output", type=Path, metavar="DIR", help="of evaluation.json and evaluation.png; default: EXPORT-evaluation"
    )
    report.add_argument(
        "--resamples",
        type=count,
        default=DEFAULTS.resamples,
        metavar="N",
        help="of the prompts, for the confidence interval; default: %(default)s",
    )
    report.add_argument("--json", action="store_true", help="print evaluation.json instead of the table")
    return parser


def run(options: argparse.Namespace) -> int:
    """Evaluate, print the table, write the files. Raises: UserError if something given cannot work."""
    output = choose_output(options.export, options.output)
    quiet_libraries("deepspeed", "transformers")
    evaluation = _evaluate(options)

    from lora.evaluation.report import describe, save_evaluation
    from lora.evaluation.table import build_table

    about = {
        "checkpoint": str(options.export),
        "adapter": str(choose_adapter(options)),
        "prompt_files": [str(path) for path in options.prompts],
        "prompt_tokens": options.prompt_tokens,
        "limit": options.limit,
        "versions": {name: version(name) for name in PACKAGES},
    }
    console = Console(highlight=False)
    if options.json:
        print(json.dumps(describe(evaluation, about), indent=2), flush=True)
    else:
        console.print(build_table(evaluation))
    try:
        save_evaluation(evaluation, output, about)
    except OSError as error:
        raise UserError(f"the report cannot be written to {output}: {error}; choose another --output") from error
    if not options.json:
        console.print(f"numbers and picture: {output}", soft_wrap=True)
    return _report_differences(evaluation)


def choose_output(export: Path, output: Path | None) -> Path:
    """The folder of the report. Raises: UserError if it is a file or lies in the checkpoint, which stays as it is."""
    export = export.resolve()
    chosen = export.with_name(f"{export.name}-evaluation") if output is None else output
    if chosen.resolve().is_relative_to(export):
        raise UserError(f"--output {chosen} lies in the checkpoint: choose a folder outside of it")
    if chosen.exists() and not chosen.is_dir():
        raise UserError(f"--output {chosen} is a file: choose a folder")
    return chosen


def choose_adapter(options: argparse.Namespace) -> Path:
    """The adapter named, else the checkpoint's own. Raises: UserError if neither is there."""
    if options.adapter is not None:
        return options.adapter
    folder = options.export / ADAPTER_FOLDER
    if options.export.is_dir() and not folder.is_dir():
        raise UserError(
            f"{options.export} has no {ADAPTER_FOLDER}/: train one (python -m lora.train), or use --adapter"
        )
    return folder


def _evaluate(options: argparse.Namespace) -> "Evaluation":
    from lora.evaluation.evaluate import evaluate_drafter
    from lora.evaluation.prompts import read_prompts
    from model.load import attach_adapter, check_export, check_vocabulary, load_export, load_tokenizer

    check_export(options.export)
    adapter = choose_adapter(options)
    tokenizer = load_tokenizer(options.export)
    prompts = read_prompts(options.prompts, tokenizer, prompt_tokens=options.prompt_tokens, limit=options.limit)
    check_trained_for(adapter, options.export)
    model: Any = load_export(options.export, dtype=options.dtype, device=options.device)
    check_vocabulary(options.export, tokenizer, model.config.vocab_size)
    attach_adapter(model, adapter)
    decoding = EvaluationOptions(options.max_new_tokens, options.block_length, options.resamples)
    return evaluate_drafter(model, prompts, decoding, track=_track)


def _track(prompts: Sequence["Prompt"]) -> Iterator["Prompt"]:
    """A progress bar on standard error, gone when all is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(prompts, description="prompts")


def check_trained_for(adapter: Path, export: Path) -> None:
    """Raises: UserError if `adapter` says that it was trained for other weights; not every adapter says."""
    from lora.adapter import RECORD_FILE
    from model.identity import identify_checkpoint

    path = adapter / RECORD_FILE
    if not path.is_file():
        return
    trained_for = read_json_object(path, f"{path} has gone").get("checkpoint")
    if trained_for not in (None, identify_checkpoint(export)):
        raise UserError(
            f"the draft adapter in {adapter} was trained for another checkpoint than {export}: train one for this one "
            f"(python -m lora.train). If the same weights only lie in other files, remove {path}"
        )


def _report_differences(evaluation: "Evaluation") -> int:
    """The exit status; says where speculation was not lossless."""
    differences = evaluation.differences
    if not differences:
        return 0
    place, mode = differences[0]
    print(
        f"error: {len(differences)} outputs of self-speculation are not greedy AR's, the first one at {place} in mode "
        f"{mode}: the device computes wrongly, or this is a defect; please report it",
        file=sys.stderr,
    )
    return EXIT_DIFFERENCE


def block_length(text: str) -> int:
    """Tokens of a drafted block: the seed and at least one."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} leaves nothing to draft beside the seed: it must be at least 2")
    return value


if __name__ == "__main__":
    sys.exit(main())

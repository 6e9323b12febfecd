"""Every decoding mode of a checkpoint on your prompts: `python -m model.evaluate EXPORT --prompts FILE.jsonl`.

Torch and transformers are imported once the options are known to be right.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.system.entry import count, exit_status, quiet_libraries
from conf.system.errors import UserError
from model.evaluate import command
from model.evaluate.command import PROMPT_ROWS
from model.evaluate.options import EvaluationOptions
from model.evaluate.records import MODES, SPECULATIVE, choose_variants
from model.export.command_options import add_choice_options, check_modes, check_sampling
from model.export.option_types import probability

if TYPE_CHECKING:
    from model.evaluate.run import Evaluation

PACKAGES = ("torch", "transformers")
SWEPT_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
OWN_ADAPTER = object()  # what --adapter without a folder gives
EXAMPLES = f"""examples:
  # all modes, speculative ones without and with the checkpoint's own adapter, and the ceiling of parallel decoding
  python -m model.evaluate exports/nld_8b_sft --adapter --prompts code.jsonl mathematics.jsonl --speed-of-light

  # exact match on questions whose answer is the last number, one curve per mode over thresholds
  python -m model.evaluate exports/nld_8b_sft --prompts gsm8k.jsonl --answer-pattern '(-?[0-9][0-9,.]*)' --sweep

  # sampled, sixteen prompts at a time
  python -m model.evaluate exports/nld_8b_sft --prompts chats.jsonl --temperature 0.8 --top-p 0.95 --batch-size 16

{PROMPT_ROWS}  "answer": "42"                            besides, text, a number or a list of accepted ones: scored by
                                            exact match (model/evaluate/README.md says what is equal)

Files: modes.json, modes.png, acceptance_length.png, thresholds.png. Exit status 1 if greedy speculation does not give
AR's tokens (in fp32; bf16 promises nothing and is only counted). Code in the checkpoint's directory is not executed.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 if outputs differ from AR's, 2 after one message, 130."""
    options = build_parser().parse_args(arguments)
    return exit_status(lambda: run(options))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.make_parser(
        "python -m model.evaluate",
        "Measure every decoding mode of a checkpoint: speed, forwards, agreement with AR, accuracy.",
        EXAMPLES,
    )
    command.add_prompt_options(parser)
    parser.add_argument(
        "--modes", type=modes, default=MODES, metavar="MODE,...", help=f"of {', '.join(MODES)}; default: all"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        nargs="?",
        const=OWN_ADAPTER,
        metavar="DIR",
        help="measure speculative modes also with this draft adapter; without DIR the checkpoint's own",
    )
    _add_decoding_options(parser.add_argument_group("decoding"))
    _add_measurement_options(parser.add_argument_group("measurements"))
    report = parser.add_argument_group("report")
    command.add_report_options(report, "modes.json", "pictures")
    report.add_argument("--keep-texts", action="store_true", help="write responses to modes.json, too")
    return parser


def _add_decoding_options(group: argparse._ArgumentGroup) -> None:
    command.add_decoding_options(group)
    group.add_argument("--batch-size", type=count, default=1, metavar="N", help="prompts decoded together; default: 1")
    add_choice_options(group)


def _add_measurement_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--answer-pattern",
        type=pattern,
        metavar="REGEX",
        help="compare its last match (the first group) in a response with the answer; default: all of the response",
    )
    group.add_argument(
        "--speed-of-light",
        action="store_true",
        help="forwards of an oracle that commits whatever is already greedy AR's: the ceiling of parallel decoding",
    )
    group.add_argument(
        "--sweep",
        type=thresholds,
        nargs="?",
        const=SWEPT_THRESHOLDS,
        default=(),
        metavar="P,...",
        help=f"all modes but ar at each threshold; default: {','.join(f'{t:g}' for t in SWEPT_THRESHOLDS)}",
    )


def run(options: argparse.Namespace) -> int:
    """Evaluate, print the tables, write the files. Raises: UserError if something given cannot work."""
    output = command.choose_output(options.export, options.output)
    check_together(options)
    adapter = None
    if options.adapter is not None:
        adapter = command.choose_adapter(options.export, None if options.adapter is OWN_ADAPTER else options.adapter)
    quiet_libraries("transformers")
    evaluation = _evaluate(options, adapter)

    from model.evaluate.report import describe, save_evaluation
    from model.evaluate.table import build_tables

    about = command.describe_inputs(options, adapter, PACKAGES)
    report, tables = describe(evaluation, about), build_tables(evaluation)
    command.publish(
        options, report, tables, lambda: save_evaluation(evaluation, output, about), f"numbers and pictures: {output}"
    )
    return command.report_differences(evaluation.differences)


def check_together(options: argparse.Namespace) -> None:
    """Raises: UserError for options that contradict each other or would have no effect."""
    check_sampling(options)
    check_modes(options, options.modes, "sweep", *([] if options.speed_of_light else ["block_length"]))
    if options.speed_of_light and options.temperature > 0:
        raise UserError("--speed-of-light follows greedy AR's text: leave --temperature out")
    if options.speed_of_light and options.thinking_budget is not None:
        raise UserError(
            "--speed-of-light is of free text: its oracle knows no --thinking-budget, leave one of them out"
        )
    if options.adapter is not None and not set(options.modes) & set(SPECULATIVE):
        raise UserError(f"--adapter drafts for {' and '.join(SPECULATIVE)}, neither is in --modes: add one")


def _evaluate(options: argparse.Namespace, adapter: Path | None) -> "Evaluation":
    from model.evaluate.run import evaluate_modes

    loaded = command.load(options, adapter)
    variants = choose_variants(options.modes, has_adapter=adapter is not None, thresholds=options.sweep)
    names = EvaluationOptions.__dataclass_fields__.keys() & vars(options).keys()
    chosen = EvaluationOptions(**{name: getattr(options, name) for name in names})
    return evaluate_modes(
        loaded.model, loaded.prompts, variants, chosen, tokenizer=loaded.tokenizer, track=command.track
    )


def modes(text: str) -> tuple[str, ...]:
    """Names of modes, separated by commas."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in MODES:
            raise argparse.ArgumentTypeError(f"there is no mode {name!r}: choose from {', '.join(MODES)}")
    return names


def thresholds(text: str) -> tuple[float, ...]:
    """Probabilities, separated by commas."""
    try:
        return tuple(dict.fromkeys(probability(value) for value in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be probabilities separated by commas, such as 0.5,0.9"
        ) from None


def pattern(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


if __name__ == "__main__":
    sys.exit(main())

"""Every decoding mode of a checkpoint on your prompts: `python -m model.evaluate EXPORT --prompts FILE.jsonl`.

Torch and transformers are imported once the options are known to be right.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.entry import count, exit_status, quiet_libraries
from conf.errors import UserError
from model.evaluation.command import (
    PROMPT_ROWS,
    add_decoding_options,
    add_prompt_options,
    add_report_options,
    choose_adapter,
    choose_output,
    describe_inputs,
    load,
    make_parser,
    publish,
    report_differences,
    track,
)
from model.evaluation.options import EvaluationOptions
from model.evaluation.records import AR, MODES, QUADRATIC, SPECULATIVE, choose_variants
from model.option_types import probability, seed, temperature

if TYPE_CHECKING:
    from model.evaluation.evaluate import Evaluation

PACKAGES = ("torch", "transformers")
SWEPT_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
OWN_ADAPTER = Path()  # what --adapter without a folder gives
EXAMPLES = f"""examples:
  # all modes, speculative ones without and with the checkpoint's own adapter, and the ceiling of parallel decoding
  python -m model.evaluate exports/nld_8b_sft --adapter --prompts code.jsonl mathematics.jsonl --speed-of-light

  # exact match on questions whose answer is the last number, one curve per mode over thresholds
  python -m model.evaluate exports/nld_8b_sft --prompts gsm8k.jsonl --answer-pattern '(-?[0-9][0-9,.]*)' --sweep

  # sampled, sixteen prompts at a time
  python -m model.evaluate exports/nld_8b_sft --prompts chats.jsonl --temperature 0.8 --top-p 0.95 --batch-size 16

{PROMPT_ROWS}  "answer": "42"                            besides, text, a number or a list of accepted ones: scored by
                                            exact match (model/evaluation/README.md says what is equal)

Files: modes.json, modes.png, acceptance_length.png, thresholds.png. Exit status 1 if greedy speculation does not give
AR's tokens (in fp32; bf16 promises nothing and is only counted). Code in the checkpoint's directory is not executed.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 if outputs differ from AR's, 2 after one message, 130."""
    options = build_parser().parse_args(arguments)
    return exit_status(lambda: run(options))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(
        "python -m model.evaluate",
        "Measure every decoding mode of a checkpoint: speed, forwards, agreement with AR, accuracy.",
        EXAMPLES,
    )
    add_prompt_options(parser)
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
    add_report_options(report, "modes.json", "pictures")
    report.add_argument("--keep-texts", action="store_true", help="write responses to modes.json, too")
    return parser


def _add_decoding_options(group: argparse._ArgumentGroup) -> None:
    add_decoding_options(group)
    group.add_argument("--batch-size", type=count, default=1, metavar="N", help="prompts decoded together; default: 1")
    group.add_argument(
        "--threshold",
        type=probability,
        metavar="P",
        help="block_diffusion: commit tokens this probable (default 0.9); linear, quadratic: end drafts before less "
        "probable ones (default 0: never)",
    )
    group.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="default: 0, greedy")
    group.add_argument("--top-k", type=count, metavar="N", help="sample from the N best tokens")
    group.add_argument("--top-p", type=positive_probability, metavar="P", help="sample from the fewest that hold P")
    group.add_argument("--seed", type=seed, metavar="N", help="of sampling; without it every run differs")
    group.add_argument(
        "--mask-groups", type=count, metavar="N", help="quadratic: groups of masks per forward; default: all"
    )
    group.add_argument(
        "--thinking-budget", type=whole, metavar="N", help="tokens of thinking at most; default: no limit"
    )


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
    output = choose_output(options.export, options.output)
    check_together(options)
    adapter = None
    if options.adapter is not None:
        adapter = choose_adapter(options.export, None if options.adapter == OWN_ADAPTER else options.adapter)
    quiet_libraries("transformers")
    evaluation = _evaluate(options, adapter)

    from model.evaluation.report import describe, save_evaluation
    from model.evaluation.table import build_tables

    about = describe_inputs(options, adapter, PACKAGES)
    report, tables = describe(evaluation, about), build_tables(evaluation)
    publish(
        options, report, tables, lambda: save_evaluation(evaluation, output, about), f"numbers and pictures: {output}"
    )
    return report_differences(evaluation.differences)


def check_together(options: argparse.Namespace) -> None:
    """Raises: UserError for options that contradict each other or would have no effect."""
    greedy = options.temperature == 0
    for name in ("top_k", "top_p", "seed"):
        if greedy and getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no effect without --temperature: add it, or leave it out")
    if options.speed_of_light and not greedy:
        raise UserError("--speed-of-light follows greedy AR's text: leave --temperature out")
    if options.mask_groups is not None and QUADRATIC not in options.modes:
        raise UserError(f"--mask-groups is of {QUADRATIC}, which is not in --modes: add it, or leave it out")
    if options.adapter is not None and not set(options.modes) & set(SPECULATIVE):
        raise UserError(f"--adapter drafts for {' and '.join(SPECULATIVE)}, neither is in --modes: add one")
    for name in ("threshold", "sweep"):
        if getattr(options, name) not in (None, ()) and set(options.modes) == {AR}:
            raise UserError(f"--{name} has no effect on {AR}, and --modes has no other: add one, or leave it out")


def _evaluate(options: argparse.Namespace, adapter: Path | None) -> "Evaluation":
    from model.evaluation.evaluate import evaluate_modes

    loaded = load(options, adapter)
    variants = choose_variants(options.modes, has_adapter=adapter is not None, thresholds=options.sweep)
    names = EvaluationOptions.__dataclass_fields__.keys() & vars(options).keys()
    chosen = EvaluationOptions(**{name: getattr(options, name) for name in names})
    return evaluate_modes(loaded.model, loaded.prompts, variants, chosen, tokenizer=loaded.tokenizer, track=track)


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


def positive_probability(text: str) -> float:
    """A number above 0, up to 1."""
    value = probability(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 leaves no token to choose: it must be above 0")
    return value


def whole(text: str) -> int:
    """A number of things, perhaps none."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least 0")
    return value


def pattern(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


if __name__ == "__main__":
    sys.exit(main())

"""Measure every decoding mode of a checkpoint on your prompts: `python -m model.evaluate EXPORT --prompts FILE.jsonl`.

Torch and transformers are imported after the command line has been checked.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.system.entry import count, exit_status, quiet_libraries
from conf.system.errors import UserError
from model.commands.decoding_options import add_choice_options, check_modes, check_sampling, probability
from model.evaluate import command_line
from model.evaluate.options import EvaluationOptions
from model.evaluate.variants import choose_variants
from model.hf.options import MODES, QUADRATIC, SPECULATIVE

if TYPE_CHECKING:
    from model.evaluate.evaluation import Evaluation

PACKAGES = ("torch", "transformers")
SWEPT_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
OWN_ADAPTER = object()  # the value of --adapter without a folder
EXAMPLES = f"""examples:
  # all modes, speculative ones without and with the checkpoint's own adapter, and the ceiling of parallel decoding
  python -m model.evaluate exports/nld_8b_sft --adapter --prompts code.jsonl mathematics.jsonl --speed-of-light

  # exact match on questions whose answer is the last number, one curve per mode over thresholds
  python -m model.evaluate exports/nld_8b_sft --prompts gsm8k.jsonl --answer-pattern '(-?[0-9][0-9,.]*)' --sweep

  # sampled, sixteen prompts at a time
  python -m model.evaluate exports/nld_8b_sft --prompts chats.jsonl --temperature 0.8 --top-p 0.95 --batch-size 16

{command_line.PROMPT_FORMAT.rstrip()}
  "answer": "42"                            optional: text, a number or a list of accepted ones, scored by
                                            exact match (model/evaluate/README.md says what counts as equal)
  "choices": ["A", "B", "C", "D"]           optional, with an "answer" among them: scored by AR's likelihood, and
                                            by masks in one forward

Files: modes.json, modes.png, acceptance_length.png, thresholds.png. Exit status 1 if greedy speculation does not give
AR's tokens in fp32 (in bf16 differences are only counted). Code in the checkpoint's directory is not executed.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 1 if outputs differ from AR's, 2 after an error message, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(options))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = command_line.make_parser(
        "python -m model.evaluate",
        "Measure every decoding mode of a checkpoint: speed, forwards, agreement with AR, accuracy.",
        EXAMPLES,
    )
    command_line.add_prompt_options(parser)
    parser.add_argument(
        "--modes", type=modes, default=MODES, metavar="MODE,...", help=f"some of {', '.join(MODES)}; default: all"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        nargs="?",
        const=OWN_ADAPTER,
        metavar="DIR",
        help="also measure speculative modes with this draft adapter; without DIR, with the checkpoint's own",
    )
    _add_decoding_options(parser.add_argument_group("decoding"))
    _add_measurement_options(parser.add_argument_group("measurements"))
    report = parser.add_argument_group("report")
    command_line.add_report_options(report, "modes.json", "pictures")
    report.add_argument("--keep-texts", action="store_true", help="also write the responses to modes.json")
    return parser


def _add_decoding_options(group: argparse._ArgumentGroup) -> None:
    command_line.add_decoding_options(group)
    group.add_argument("--batch-size", type=count, default=1, metavar="N", help="prompts decoded together; default: 1")
    add_choice_options(group)


def _add_measurement_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--answer-pattern",
        type=pattern,
        metavar="REGEX",
        help="compare its last match (the first group) in a response with the answer; default: the whole response",
    )
    group.add_argument(
        "--speed-of-light",
        action="store_true",
        help="measure the ceiling of parallel decoding: an oracle commits every token that is already greedy AR's",
    )
    group.add_argument(
        "--sweep",
        type=thresholds,
        nargs="?",
        const=SWEPT_THRESHOLDS,
        default=(),
        metavar="P,...",
        help=f"measure all modes but ar at each threshold; default: {','.join(f'{t:g}' for t in SWEPT_THRESHOLDS)}",
    )
    group.add_argument(
        "--verifier-weight",
        type=thresholds,
        default=(),
        metavar="W,...",
        help="measure quadratic also verified by W x AR + (1 - W) x diffusion, which is not lossless below 1",
    )


def _run(options: argparse.Namespace) -> int:
    """Evaluate, print the tables and write the files. Raises: UserError if something given cannot be used."""
    output = command_line.choose_output(options.export, options.output)
    check_together(options)
    adapter = None
    if options.adapter is not None:
        adapter = command_line.choose_adapter(
            options.export, None if options.adapter is OWN_ADAPTER else options.adapter
        )
    quiet_libraries("transformers")
    evaluation = _evaluate(options, adapter)

    from model.evaluate.modes_report import describe_evaluation, save_modes_report
    from model.evaluate.tables import build_tables

    about = command_line.describe_inputs(options, adapter, PACKAGES)
    report, tables = describe_evaluation(evaluation, about), build_tables(evaluation)
    command_line.publish(
        options, report, tables, lambda: save_modes_report(evaluation, output, about), f"numbers and pictures: {output}"
    )
    return command_line.report_differences(evaluation.differences)


def check_together(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other or have no effect. Raises: UserError."""
    check_sampling(options)
    check_modes(options, options.modes, "sweep")
    if options.speed_of_light and options.temperature > 0:
        raise UserError("--speed-of-light follows greedy AR's text: leave --temperature out")
    if options.speed_of_light and options.thinking_budget is not None:
        raise UserError("--speed-of-light cannot follow a --thinking-budget: leave one of the two out")
    if options.verifier_weight and QUADRATIC not in options.modes:
        raise UserError(f"--verifier-weight only affects mode {QUADRATIC}: add it to --modes, or leave the option out")
    if 1 in options.verifier_weight:
        raise UserError("--verifier-weight 1 is AR alone, which mode quadratic measures anyway: leave the 1 out")
    if options.verifier_weight and options.mask_groups is not None:
        raise UserError("--verifier-weight needs all groups of masks: leave --mask-groups out")
    if options.adapter is not None and not set(options.modes) & set(SPECULATIVE):
        raise UserError(f"--adapter only drafts for {' and '.join(SPECULATIVE)}: add one of them to --modes")


def _evaluate(options: argparse.Namespace, adapter: Path | None) -> "Evaluation":
    from model.evaluate.evaluation import evaluate_modes

    loaded = command_line.load(options, adapter)
    if not (
        options.speed_of_light or any(prompt.choices for prompt in loaded.prompts)
    ):  # what uses blocks even with AR
        check_modes(options, options.modes, "block_length")
    variants = choose_variants(
        options.modes,
        has_adapter=adapter is not None,
        thresholds=options.sweep,
        verifier_weights=options.verifier_weight,
    )
    names = EvaluationOptions.__dataclass_fields__.keys() & vars(options).keys()
    chosen = EvaluationOptions(**{name: getattr(options, name) for name in names})
    return evaluate_modes(
        loaded.model, loaded.prompts, variants, chosen, tokenizer=loaded.tokenizer, track=command_line.track
    )


def modes(text: str) -> tuple[str, ...]:
    """Parse names of modes separated by commas."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in MODES:
            raise argparse.ArgumentTypeError(f"there is no mode {name!r}: choose from {', '.join(MODES)}")
    return names


def thresholds(text: str) -> tuple[float, ...]:
    """Parse probabilities separated by commas."""
    try:
        return tuple(dict.fromkeys(probability(value) for value in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be probabilities separated by commas, such as 0.5,0.9"
        ) from None


def pattern(text: str) -> str:
    """Check that the text is a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from None
    return text


if __name__ == "__main__":
    sys.exit(main())

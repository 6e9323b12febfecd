"""Measure what a draft adapter gains: `python -m lora.evaluate EXPORT --prompts FILE.jsonl [FILE ...]`.

Torch and transformers are imported once the options are known to be right.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.system.entry import exit_status, quiet_libraries
from model.evaluate import command_line
from model.evaluate.options import EvaluationOptions
from model.export.draft_adapter import ADAPTER_FOLDER

if TYPE_CHECKING:
    from lora.evaluate.gain import DrafterEvaluation

_PACKAGES = ("torch", "transformers", "peft")
_EXAMPLES = f"""examples:
  # a checkpoint with its own adapter, two groups of prompts
  python -m lora.evaluate exports/nld_8b_sft --prompts code.jsonl mathematics.jsonl

  # another adapter, a quick look
  python -m lora.evaluate exports/nld_8b_sft --adapter runs/drafter/adapter --prompts chats.jsonl --limit 20

{command_line.PROMPT_FORMAT}
Every prompt is decoded greedily three times: autoregressively, and by linear self-speculation without and with the
adapter. Exit status 1 if speculation does not give AR's tokens (in fp32; bf16 promises nothing and is only counted).
Code in the checkpoint's directory is not executed.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns: exit status 0; 1 if outputs differ from AR's; 2 after one message; 130."""
    options = _build_parser().parse_args(arguments)
    return exit_status(lambda: _run(options))


def _build_parser() -> argparse.ArgumentParser:
    parser = command_line.make_parser(
        "python -m lora.evaluate",
        "Measure what a draft adapter gains: tokens per forward with and without it.",
        _EXAMPLES,
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help=f"default: EXPORT/{ADAPTER_FOLDER}")
    command_line.add_prompt_options(parser)
    command_line.add_decoding_options(parser.add_argument_group("decoding"))
    command_line.add_report_options(parser.add_argument_group("report"), "evaluation.json", "evaluation.png")
    return parser


def _run(options: argparse.Namespace) -> int:
    """Evaluate, print the table, write the files. Raises: UserError if something given cannot work."""
    output = command_line.choose_output(options.export, options.output)
    quiet_libraries("deepspeed", "transformers")
    adapter = command_line.choose_adapter(options.export, options.adapter)
    evaluation = _evaluate(options, adapter)

    from lora.evaluate.gain_report import build_gain_report, build_gain_table, save_gain_report

    about = command_line.describe_inputs(options, adapter, _PACKAGES)
    report, table = build_gain_report(evaluation, about), build_gain_table(evaluation)
    command_line.publish(
        options, report, [table], lambda: save_gain_report(evaluation, output, about), f"numbers and picture: {output}"
    )
    return command_line.report_differences(evaluation.differences)


def _evaluate(options: argparse.Namespace, adapter: Path) -> "DrafterEvaluation":
    from lora.evaluate.gain import evaluate_drafter

    loaded = command_line.load(options, adapter)
    decoding = EvaluationOptions(
        max_new_tokens=options.max_new_tokens, block_length=options.block_length, resamples=options.resamples
    )
    return evaluate_drafter(loaded.model, loaded.prompts, decoding, track=command_line.track)


if __name__ == "__main__":
    sys.exit(main())

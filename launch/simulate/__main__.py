"""Run the trainer's own step as ranks of a job: `python -m launch.simulate experiment=nld_14b_joint --gpus 256`."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from conf.composition.compose import compose_size
from conf.system.entry import OneLineParser, count, exit_status
from launch.simulate.device_kind import KINDS

EXIT_FAULTS = 1
WIDTH = 140
EXAMPLES = """examples:
  python -m launch.simulate experiment=nld_14b_joint --gpus 256
  python -m launch.simulate experiment=nld_8b_sft --gpus 64 --ranks 0,17 --document-tokens 1500 --scored-share 0.4
  python -m launch.simulate experiment=nld_14b_ar parallel.pipeline_parallel=4 --gpus 256 --picture memory.png

Nothing computes: tensors of the device are fake, and so are the other ranks. A whole optimizer step, an evaluation and
the description of a checkpoint run as they would. Layers are megatron-core's own, not Transformer Engine's; what only a
device shows (speed, fragmentation, what kernels take within themselves) is not seen. Data, tokenizer and start weights
need not be given. Exit status: 0 no fault found, 1 faults, 2 cannot run like this.
"""


def main() -> None:
    """Run the command."""
    parser = build_parser()
    arguments = parser.parse_intermixed_args()
    sys.exit(exit_status(lambda: run_simulation(arguments)))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = OneLineParser(
        prog="python -m launch.simulate",
        description="Memory, collectives, FLOPs and faults of a training step, by running it without a GPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as for pretrain.train: group=option, key=value"
    )
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="GPUs of the run")
    parser.add_argument(
        "--ranks", default="distinct", metavar="R", help="such as 0,17; default: one of each kind (%(default)s)"
    )
    parser.add_argument(
        "--microbatches", type=count, metavar="N", help="of a rank's step (default: as fill the pipeline, at least 2)"
    )
    parser.add_argument(
        "--document-tokens", type=count, metavar="N", help="length of documents (default: one per sequence)"
    )
    parser.add_argument(
        "--scored-share", type=portion, default=1.0, metavar="X", help="part of documents that is scored (%(default)g)"
    )
    parser.add_argument("--device", default="h100", choices=KINDS, help="kind of GPU (%(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a PNG of live bytes over the step")
    parser.add_argument("--brief", action="store_true", help="leave out modules, tensors and questions of the host")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    return parser


def portion(text: str) -> float:
    """Parse a command-line option from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: give 0.4 for 40 %")
    return value


def run_simulation(arguments: argparse.Namespace) -> int:
    """Simulate, print the result, and return the exit status. Raises: UserError."""
    from launch.simulate.job import simulate_job
    from launch.simulate.picture import draw_memory
    from launch.simulate.tables import print_job

    job = simulate_job(
        compose_size(arguments.overrides),
        arguments.gpus,
        arguments.ranks,
        arguments.microbatches,
        arguments.document_tokens,
        arguments.scored_share,
        arguments.device,
    )
    if arguments.picture:
        draw_memory(job.reports, arguments.picture)
    if arguments.json:
        print(json.dumps(job.describe()))
    else:
        print_job(Console(width=WIDTH, highlight=False), job, arguments.brief)
    return EXIT_FAULTS if job.faults else 0


if __name__ == "__main__":
    main()

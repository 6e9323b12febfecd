"""Run the trainer's own step as ranks of a job: `python -m launch.simulate experiment=nld_14b_joint --gpus 256`."""

import argparse
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from conf.composition.compose import compose_size
from conf.system.entry import OneLineParser, count, exit_status
from conf.system.errors import UserError
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that folders and processes go, too
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
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a share: give 0.4 for 40 %")


def run_simulation(arguments: argparse.Namespace) -> int:
    """Simulate, print the result, and return the exit status. Raises: UserError."""
    from launch.simulate.job import simulate_job
    from launch.simulate.picture import draw_memory
    from launch.simulate.tables import print_job

    if arguments.picture:
        check_picture(arguments.picture)
    job = simulate_job(
        compose_size(arguments.overrides),
        arguments.gpus,
        ranks=arguments.ranks,
        microbatches=arguments.microbatches,
        document_tokens=arguments.document_tokens,
        scored_share=arguments.scored_share,
        device=arguments.device,
    )
    if arguments.json:
        print(json.dumps(job.describe()))
    else:
        print_job(Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False), job, arguments.brief)
    if arguments.picture:
        try:
            draw_memory(job.reports, arguments.picture)
        except OSError as error:
            raise UserError(f"--picture {arguments.picture} cannot be written: {error.strerror}") from error
    return EXIT_FAULTS if job.faults else 0


def check_picture(path: Path) -> None:
    """Raise UserError before a minute of work if no PNG can be written there."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--picture {path}: it will be a PNG, so give it a name that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--picture {path}: cannot make its folder: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--picture {path} cannot be written: choose another folder or name")


if __name__ == "__main__":
    main()

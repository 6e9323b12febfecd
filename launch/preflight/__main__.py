"""Whether a run could start: `python -m launch.preflight [overrides] [--nodes N --gpus-per-node G]`."""

import argparse
import sys
import time

from rich.console import Console
from rich.text import Text

from conf.composition.hydra_entry import run_composed
from conf.composition.trees import RUN_TREE
from conf.schema import RunConfig
from conf.system.entry import OneLineParser, count, quiet_libraries
from conf.system.errors import UserError
from launch.preflight.checks import CHECKS, DRY_BATCH
from launch.preflight.devices import count_gpus_quickly
from launch.preflight.findings import Result
from launch.preflight.report import STYLES, print_json, print_table, worst
from launch.preflight.report import count as count_rows
from launch.preflight.runner import Row, run_checks
from launch.preflight.subject import Subject

USAGE = """\
Check everything that can stop a training run before it starts: configuration, packages, ports, run folder, disk space,
tokenizer, data, checkpoints, devices, kernels, and a step with the largest shapes on the devices of this machine.

usage: python -m launch.preflight [group=option ...] [key=value ...] [options]

options:
  --nodes N            nodes of the job (default: 1)
  --gpus-per-node G    ranks per node (default: the CUDA devices here; without any, one copy of the model)
  --no-dry-batch       leave out the step with the largest shapes
  --json               one JSON object on standard output in place of the table

The overrides are those of `python -m pretrain.train`. Status 0: nothing failed. 2: something did, and the table says
what to do. Nothing is written into the run folder; the packing index of data seen for the first time is kept beside
the data, as the run would do.

example:
  python -m launch.preflight experiment=nld_8b_joint data.train=DIR data.tokenizer=DIR --nodes 32 --gpus-per-node 8
"""


def main() -> None:
    """Exit with 0, or 2 if a check failed or the command line does not compose."""
    parser = OneLineParser(prog="python -m launch.preflight", add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=count, default=1)
    parser.add_argument("--gpus-per-node", type=count, default=None)
    parser.add_argument("--no-dry-batch", action="store_true")
    parser.add_argument("--json", action="store_true")
    options, overrides = parser.parse_known_args()
    sys.argv[1:] = overrides
    sys.exit(run_composed(RUN_TREE, USAGE, lambda config, _: run_preflight(config, options)))


def run_preflight(config: RunConfig, options: argparse.Namespace) -> None:
    """Checks, says, and raises UserError if something failed."""
    quiet_libraries("torch.distributed")
    subject = Subject(config, options.nodes, options.gpus_per_node or _default_ranks_per_node(config))
    checks = CHECKS if options.no_dry_batch else (*CHECKS, DRY_BATCH)
    rows: list[Row] = []
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        since = time.monotonic()
        for found in run_checks(subject, checks, lambda name: status.update(Text(f"{name} ..."))):
            result, seconds = worst(found), time.monotonic() - since
            mark = (f"{result.value:<8}", STYLES[result])
            console.print(Text.assemble(mark, f"{found[0].check} ({seconds:.1f} s)"))
            rows += found
            since = time.monotonic()
    (print_json if options.json else print_table)(rows, subject)
    if num_failed := count_rows(rows, Result.failed):
        raise UserError(f"{num_failed} of {len(rows)} findings would stop the run; each says what to do")


def _default_ranks_per_node(config: RunConfig) -> int:
    is_cpu_run = Subject(config, 1, 1).is_cpu_run
    return (0 if is_cpu_run else count_gpus_quickly()) or config.parallel.model_parallel


if __name__ == "__main__":
    main()

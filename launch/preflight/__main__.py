"""Check whether a job can start: `python -m launch.preflight [overrides] [--nodes N --gpus-per-node G]`."""

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.composition.command_line import run_composed
from conf.composition.trees import RUN_TREE
from conf.schema import RunConfig
from conf.system.entry import OneLineParser, count, quiet_libraries
from conf.system.errors import UserError
from launch.preflight.data_sources import check_data_tokenizer, check_heldout_data, check_training_data
from launch.preflight.dry_batch import check_dry_batch
from launch.preflight.environment import check_devices, check_kernels, check_package_versions, count_gpus_quickly
from launch.preflight.rendezvous import check_ports
from launch.preflight.run import check_configuration, check_disk_space, check_run_folder, check_start
from launch.preflight.runner import Finding, PreflightCheck, Result, TrainingJob, run_checks

USAGE = """\
Check everything that can stop a training run before it starts: configuration, packages, ports, run folder, disk space,
tokenizer, data, checkpoints, devices, kernels, and a step with the largest shapes on the devices of this machine.

usage: python -m launch.preflight [group=option ...] [key=value ...] [options]

options:
  --nodes N            nodes of the job (default: 1)
  --gpus-per-node G    ranks per node (default: the CUDA devices here; without any, one copy of the model)
  --no-dry-batch       leave out the step with the largest shapes
  --json               print one JSON object instead of the table

The overrides are those of `python -m pretrain.train`. Exit status 0: nothing failed. 2: something did, and the table
says what to do. Nothing is written into the run folder but kernels that the dry batch compiled, for the run to load.
The packing index of data seen for the first time is stored next to the data, as the run would do.

example:
  python -m launch.preflight experiment=nld_8b_joint data.train=DIR data.tokenizer=DIR --nodes 32 --gpus-per-node 8
"""

CHECKS = (  # in the order in which they run: quick ones first
    PreflightCheck("configuration", check_configuration),
    PreflightCheck("packages", check_package_versions),
    PreflightCheck("ports", check_ports),
    PreflightCheck("run folder", check_run_folder),
    PreflightCheck("disk space", check_disk_space),
    PreflightCheck("tokenizer", check_data_tokenizer, needs=("packages",)),
    PreflightCheck("training data", check_training_data, needs=("tokenizer",)),
    PreflightCheck("held-out data", check_heldout_data, needs=("tokenizer",)),
    PreflightCheck("start", check_start, needs=("training data",)),
    PreflightCheck("devices", check_devices, needs=("packages",)),
    PreflightCheck("kernels", check_kernels, needs=("packages",)),
)
DRY_BATCH = PreflightCheck(
    "dry batch", check_dry_batch, needs=("configuration", "training data", "held-out data", "devices", "kernels")
)
STYLES = {Result.ok: "green", Result.warning: "yellow", Result.failed: "bold red"}
WIDTH = 120  # of the table where there is no terminal to ask


def main() -> None:
    """Exit with 0, or with 2 if a check failed or the command line does not compose."""
    parser = OneLineParser(prog="python -m launch.preflight", add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=count, default=1)
    parser.add_argument("--gpus-per-node", type=count, default=None)
    parser.add_argument("--no-dry-batch", action="store_true")
    parser.add_argument("--json", action="store_true")
    options, overrides = parser.parse_known_args()
    sys.argv[1:] = overrides
    sys.exit(run_composed(RUN_TREE, USAGE, lambda config, _: run_preflight(config, options)))


def run_preflight(config: RunConfig, options: argparse.Namespace) -> None:
    """Run the checks and print what they found.

    Raises:
        UserError: A check failed.
    """
    quiet_libraries("torch.distributed")
    job = TrainingJob(config, options.nodes, options.gpus_per_node or _default_ranks_per_node(config))
    checks = CHECKS if options.no_dry_batch else (*CHECKS, DRY_BATCH)
    findings: list[Finding] = []
    console = Console(stderr=True, highlight=False)
    with console.status("") as status:
        since = time.monotonic()
        for found in run_checks(job, checks, lambda name: status.update(Text(f"{name} ..."))):
            worst, seconds = find_worst(found), time.monotonic() - since
            mark = (f"{worst.value:<8}", STYLES[worst])
            console.print(Text.assemble(mark, f"{found[0].check} ({seconds:.1f} s)"))
            findings += found
            since = time.monotonic()
    (print_json if options.json else print_table)(findings, job)
    if num_failed := count_findings(findings, Result.failed):
        raise UserError(f"{num_failed} of {len(findings)} findings would stop the run; each says what to do")


def _default_ranks_per_node(config: RunConfig) -> int:
    is_cpu_run = TrainingJob(config, 1, 1).is_cpu_run
    return (0 if is_cpu_run else count_gpus_quickly()) or config.parallel.model_parallel


def print_table(findings: list[Finding], job: TrainingJob) -> None:
    """Print a row per finding on standard output."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(f"{job.config.run.dir} on {job.nodes} nodes x {job.gpus_per_node}", soft_wrap=True)
    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("detail", overflow="fold")
    previous = ""
    for finding in findings:
        name = finding.check if finding.check != previous else ""
        table.add_row(name, Text(finding.result.value, style=STYLES[finding.result]), Text(finding.detail))
        previous = finding.check
    console.print(table)


def print_json(findings: list[Finding], job: TrainingJob) -> None:
    """Print the findings as one JSON object on standard output."""
    checks = [{"check": found.check, "result": found.result.value, "detail": found.detail} for found in findings]
    counts = {result.value: count_findings(findings, result) for result in Result}
    values = {"run_dir": str(Path(job.config.run.dir)), "world_size": job.world_size, "checks": checks}
    print(json.dumps(values | {"counts": counts}, indent=2))


def count_findings(findings: list[Finding], result: Result) -> int:
    """Return how many findings have this result."""
    return sum(finding.result is result for finding in findings)


def find_worst(findings: list[Finding]) -> Result:
    """Return the most serious result among the findings."""
    order = list(Result)
    return max((finding.result for finding in findings), key=order.index)


if __name__ == "__main__":
    main()

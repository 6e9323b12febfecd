"""Run a training step with the largest shapes in processes of its own (pretrain/dry_batch.py)."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.rules.layout import num_microbatches
from conf.schema import RunConfig
from launch.preflight.runner import Finding, TrainingJob
from pretrain.dry_batch import REPORT_FILE
from pretrain.run.run_folder import CONFIG_FILE, write_out

TIMEOUT_SECONDS = 1800
NEARLY_FULL = 0.95  # of a device's memory
# Variables by which a surrounding job would assign its own ranks to the processes.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class DryBatchOutcome:
    """Holds what the first rank measured (`values`; None if it failed) and all output of the processes."""

    values: dict[str, Any] | None
    output: str


def check_dry_batch(job: TrainingJob) -> Iterator[Finding]:
    """Check one step: of one copy of the model on CPUs, of as many as there are devices for on GPUs."""
    num_ranks = count_dry_ranks(job)
    if not num_ranks:
        needed = job.config.parallel.model_parallel
        yield Finding.warning(f"not run: it needs {needed} devices, and this machine has {len(job.gpus)}")
        return
    outcome = run_dry_batch(job.config, num_ranks, count_microbatches(job.config, job.world_size))
    yield (_describe_failure(job, num_ranks, outcome) if outcome.values is None else _describe(job, outcome.values))


def count_dry_ranks(job: TrainingJob) -> int:
    """Return the number of processes; 0 if this machine has too few devices."""
    one_copy = job.config.parallel.model_parallel
    if job.is_cpu_run:
        return one_copy
    # More copies shard the optimizer's state further, which comes nearer to the memory of the job.
    return min(len(job.gpus), job.world_size) // one_copy * one_copy


def count_microbatches(config: RunConfig, world_size: int) -> int:
    """Return as many as fill the pipeline, but no more than the job has.

    A full pipeline holds as many activations at once as it ever does.
    """
    parallel = config.parallel
    filling = parallel.pipeline_parallel * (2 if parallel.virtual_pipeline_parallel > 1 else 1)
    return min(filling, num_microbatches(config, world_size))


def run_dry_batch(config: RunConfig, num_ranks: int, num_microbatches: int) -> DryBatchOutcome:
    """Run it in a temporary folder, which is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="preflight_") as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_text(write_out(config), encoding="utf-8")
        arguments = ["pretrain.dry_batch", str(path), "--microbatches", str(num_microbatches)]
        output = _run([*_launcher(num_ranks), *arguments])
        report = Path(folder) / REPORT_FILE
        return DryBatchOutcome(json.loads(report.read_text(encoding="utf-8")) if report.exists() else None, output)


def _launcher(num_ranks: int) -> list[str]:
    if num_ranks == 1:
        return [sys.executable, "-m"]
    options = ["--nnodes=1", f"--nproc_per_node={num_ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m"]


def _run(command: list[str]) -> str:
    """Return the output of a command; it is killed with all its processes if it takes too long."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=merged, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=TIMEOUT_SECONDS)[0]
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0]
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"{output}\nerror: stopped after {TIMEOUT_SECONDS} s"


def _describe(job: TrainingJob, values: dict[str, Any]) -> Finding:
    peak, total = values["peak_memory_bytes"], values["device_memory_bytes"]
    sequences = f"{values['num_microbatches']} x {values['micro_batch_size']} sequences of {values['sequence_length']}"
    detail = (
        f"on {values['world_size']} of {job.world_size} ranks, each {sequences}, one document each: step "
        f"{values['step_seconds']:.3g} s, peak memory {peak / 1e9:.3g} GB per rank"
        + (f" of {total / 1e9:.3g} GB" if total else "")
    )
    if values["heldout_seconds"] is not None:
        detail += f", held-out microbatch {values['heldout_seconds']:.3g} s"
    if values["compiled_kernels"]:
        saved = f"saved for the run in {folder}" if (folder := job.config.runtime.compile_cache) else "not saved"
        detail += f", {values['compiled_kernels']} kernels compiled in {values['compile_seconds']:.0f} s, {saved}"
    if not values["is_finite"]:
        return Finding.failed(f"{detail}; its loss is not finite: see precision.dtype and model.init_std")
    if total and peak > NEARLY_FULL * total:
        return Finding.warning(
            f"{detail}: close to the limit; lower train.micro_batch_size or set parallel.recompute=elementwise"
        )
    return Finding.ok(detail)


def _describe_failure(job: TrainingJob, num_ranks: int, outcome: DryBatchOutcome) -> Finding:
    """Report the cause in a line, and write the whole output to a file."""
    descriptor, log = tempfile.mkstemp(prefix="preflight_dry_batch_", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(outcome.output)
    detail = f"on {num_ranks} of {job.world_size} ranks: {find_cause(outcome.output)} (their whole output: {log})"
    if "OutOfMemoryError" in outcome.output and num_ranks < job.world_size:
        copies = job.world_size // job.config.parallel.model_parallel
        return Finding.warning(
            f"{detail}; the job shards optimizer state over {copies} copies and needs less: python -m launch.plan "
            "computes it"
        )
    return Finding.failed(detail)


def find_cause(output: str) -> str:
    """Return the most telling line: a message for the user, else the error that ends the first traceback."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith(("error:", "error on rank"))]
    causes += [line for line in lines if line.split(":")[0].split(".")[-1].endswith(("Error", "Exception"))]
    return (causes or lines[-1:] or ["it ended without output"])[0]

"""The launch scripts on a real Slurm: limits, preemption, requeue, chains and arrays. `make test-slurm` runs them."""

import contextlib
import itertools
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.layouts import TP2
from tests.helpers.processes import load_lines, train_many
from tests.helpers.slurm_cluster import SlurmCluster, wait_for
from tests.helpers.toy_data import ToyData, tokens_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 24
NODE = ("--nodes=1", "--gpus-per-node=2", "--cpus-per-task=1", "--mem=0")
TWO_RANKS = (*NODE, "--ntasks-per-node=2", "--time=20")


def submit(
    cluster: SlurmCluster, folder: Path, *words: str, options: tuple[str, ...] = TWO_RANKS, **environment: str
) -> int:
    """Submit slurm.sbatch with `words`; its output goes to folder/out_<job>."""
    return cluster.submit(*options, f"--output={folder}/out_%j", "launch/slurm.sbatch", *words, **environment)


def submit_fake(cluster: SlurmCluster, folder: Path, *plan: str) -> int:
    """Submit ranks that do what `plan` says (tests/helpers/fake_rank.py), and wait until those that wait are ready."""
    words, logs = (str(folder), *plan), str(folder / "logs")
    job = submit(cluster, folder, *words, MODULE="tests.helpers.fake_rank", LOG_DIR=logs, SECONDS_FOR_OTHERS="3")
    if plan[0].startswith("wait"):
        wait_until_ready(folder)
    return job


def wait_until_ready(folder: Path) -> None:
    """Wait until both fake ranks handle signals."""
    wait_for("the ranks", lambda: all((folder / f"ready_{rank}").exists() for rank in (0, 1)), 120)


def output(folder: Path, job: int) -> str:
    return (folder / f"out_{job}").read_text()


def curve(run_dir: Path) -> list[tuple[object, ...]]:
    """Return the values of every step that must be reproduced."""
    keys = ("step", "tokens_seen", "loss", "ar_loss", "diffusion_loss", "masking_ratio", "grad_norm", "lr")
    train = [tuple(line[key] for key in keys) for line in load_lines(run_dir, "train")]
    return train + [(line["step"], line["loss"], line["ar_loss"]) for line in load_lines(run_dir, "heldout")]


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """Return the processes that train the run."""
    words = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [process for process, line in words if f"run.dir={run_dir}" in line and "pretrain.train" in line[:4]]


def suspend_until_warned(run_dir: Path) -> None:
    """Suspend the ranks of a run after three steps until Slurm's early warning is pending.

    So even on a fast machine the run is unfinished when the limit is near, without waiting for a slow one.
    """
    metrics = run_dir / "metrics.jsonl"
    wait_for("three steps", lambda: metrics.exists() and metrics.read_text().count('"kind": "train"') >= 3, 300)
    ranks = ranks_of(run_dir)
    for process in ranks:
        process.suspend()
    try:
        wait_for("SIGUSR1", lambda: all(map(_was_warned, ranks)), 240)
    finally:
        for process in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def _was_warned(process: psutil.Process) -> bool:
    """Return whether SIGUSR1 is pending, or the process has ended (Slurm may also have resumed it)."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = int(next(line.split()[1] for line in lines if line.startswith("ShdPnd")), 16)
    return bool(pending & 1 << (signal.SIGUSR1 - 1))


def test_at_its_time_limit_a_run_saves_is_queued_again_and_ends_as_if_undisturbed(
    cluster: SlurmCluster, toy_data: ToyData, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = [*toy_data.overrides(), "stage=joint", *TP2, tokens_of(STEPS), "checkpoint.every_steps=10"]
    limits = ("--time=3", "--signal=USR1@60")  # Slurm counts in minutes; a busy machine needs one to start
    job = submit(cluster, tmp_path, *words, f"run.dir={run_dir}", options=(*TWO_RANKS, *limits))
    suspend_until_warned(run_dir)
    wait_for("the requeue", lambda: cluster.show(job)["Restarts"] != "0", 120)
    [saved] = (run_dir / "checkpoints").glob("step_????????")
    assert saved.name not in ("step_00000010", "step_00000020", f"step_{STEPS:08}")
    assert cluster.wait(job, "COMPLETED")["ExitCode"] == "0:0"
    text = output(tmp_path, job)
    assert text.count(": requeued\n") == int(cluster.show(job)["Restarts"]) and "resuming" in text
    assert len(list((run_dir / "starts").iterdir())) == 2
    train_many(2, [[*words, f"run.dir={tmp_path}/undisturbed"]], tmp_path)
    assert curve(run_dir) == curve(tmp_path / "undisturbed")


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit_fake(cluster, tmp_path, "wait:75", "wait:75")
    cluster.run("scancel", str(job))
    cluster.wait(job, "CANCELLED", 90)
    assert (tmp_path / "signal_0").read_text() == "SIGTERM"
    assert "not requeued" in output(tmp_path, job)
    time.sleep(8)  # longer than a requeued job is held back
    assert cluster.state(job) == "CANCELLED"


def test_a_preempted_job_saves_and_runs_again_when_there_is_room(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit_fake(cluster, tmp_path, "wait:75", "wait:75")
    for rank in (0, 1):
        (tmp_path / f"ready_{rank}").unlink()
    urgent = cluster.submit(*NODE, "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    cluster.wait(urgent, "COMPLETED", 90)
    wait_until_ready(tmp_path)
    assert (tmp_path / "signal_0").read_text() == "SIGTERM"
    assert cluster.show(job)["Restarts"] != "0"
    cluster.run("scancel", str(job))
    cluster.wait(job, "CANCELLED", 90)


@pytest.mark.parametrize(
    ("plan", "code", "said"),
    [
        (("exit:2", "exit:2"), "2:0", "says what to fix"),
        (("kill:9", "wait:75"), "137:0", "no checkpoint was completed since the start"),
        (("wait:130", "wait:130"), "130:0", "interrupted: not requeued"),
    ],
)
def test_what_must_not_start_again_does_not(
    cluster: SlurmCluster, tmp_path: Path, plan: tuple[str, ...], code: str, said: str
) -> None:
    job = submit_fake(cluster, tmp_path, *plan)
    if plan[0].startswith("wait"):
        cluster.run("scancel", "--signal=INT", str(job))
    assert cluster.wait(job, "FAILED", 120)["ExitCode"] == code
    assert said in output(tmp_path, job)


def test_a_number_of_tasks_that_does_not_fit_the_layout_is_one_message(cluster: SlurmCluster, tmp_path: Path) -> None:
    options = (*NODE, "--ntasks-per-node=3", "--time=20")
    job = submit(cluster, tmp_path, "experiment=quickstart_ar", f"run.root={tmp_path}", options=options)
    assert cluster.wait(job, "FAILED", 60)["ExitCode"] == "2:0"
    assert output(tmp_path, job).startswith("error: 3 ranks are not a multiple of parallel.tensor_parallel=2")


def test_a_rank_without_its_variables_says_so(cluster: SlurmCluster, tmp_path: Path) -> None:
    script = "srun env -u SLURM_LOCALID launch/rank.sh pretrain.train"
    job = cluster.submit(*TWO_RANKS, f"--output={tmp_path}/out_%j", "--wrap", script)
    assert cluster.wait(job, "FAILED", 60)["ExitCode"] == "2:0"
    assert "error: SLURM_LOCALID not set" in output(tmp_path, job)


def test_an_array_trains_one_ablation_per_task(cluster: SlurmCluster, toy_data: ToyData, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("run.name=low schedule.peak_lr=5e-4\nrun.name=high schedule.peak_lr=2e-3\n")
    words = [
        *toy_data.overrides(),
        tokens_of(3),
        f"run.root={tmp_path}",
        "schedule.warmup_fraction=0",
        "schedule.decay_fraction=0",
    ]
    options = (*NODE, "--ntasks-per-node=1", "--time=20", "--array=0-1%1")
    job = submit(cluster, tmp_path, "--sweep", str(sweep), *words, options=options)
    for task in (0, 1):
        cluster.wait(f"{job}_{task}", "COMPLETED")
    rates = [max(line["lr"] for line in load_lines(tmp_path / name, "train")) for name in ("low", "high")]
    assert rates == [5e-4, 2e-3]
    assert [len(load_lines(tmp_path / name, "train")) for name in ("low", "high")] == [3, 3]


def test_the_chain_of_stages_runs_in_order_to_a_draft_adapter(
    cluster: SlurmCluster, toy_data: ToyData, tmp_path: Path
) -> None:
    export = tmp_path / "instruct"
    result = cluster.run(
        "launch/stages.sh",
        "quickstart",
        *toy_data.overrides(),
        *(f"run.root={tmp_path}", "schedule.warmup_fraction=0", "ar.init_from=null", tokens_of(4)),
        *(f"sft.{word}" for word in [*toy_data.overrides(chats=True), tokens_of(3, chats=True)]),
        *(f"drafter.data={toy_data.train_chats}", f"drafter.heldout={toy_data.heldout_chats}"),
        *("drafter.train.steps=3", "drafter.evaluation.sequences=4", "drafter.runtime.progress_bar=false"),
        f"drafter.run.root={tmp_path}",
        STAGE_OPTIONS=" ".join([*TWO_RANKS, f"--output={tmp_path}/out_%j"]),
        EXPORT_OPTIONS=" ".join([*NODE, "--ntasks-per-node=1", "--time=20", f"--output={tmp_path}/out_%j"]),
        DRAFTER_OPTIONS=" ".join([*TWO_RANKS, f"--output={tmp_path}/out_%j"]),
        EXPORT=str(export),
    )
    jobs = {stage: int(number) for stage, number in (line.split() for line in result.splitlines())}
    assert list(jobs) == ["ar", "joint", "sft", "export", "drafter"]
    shown = [cluster.wait(job, "COMPLETED", 600) for job in jobs.values()]
    for before, after in itertools.pairwise(shown):
        assert before["EndTime"] <= after["StartTime"]
    assert f"weights from {tmp_path}/quickstart/ar" in output(tmp_path, jobs["joint"])
    assert (export / "linear_spec_lora" / "adapter_model.safetensors").exists()


def test_where_a_stage_fails_the_later_ones_are_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    options = f"--output={tmp_path}/out_%j " + " ".join(TWO_RANKS)
    words = ("launch/stages.sh", "quickstart", f"run.root={tmp_path}")
    names = ("STAGE_OPTIONS", "EXPORT_OPTIONS", "DRAFTER_OPTIONS")
    result = cluster.run(*words, **dict.fromkeys(names, options), EXPORT=str(tmp_path / "instruct"))
    first, *rest = [int(line.split()[1]) for line in result.splitlines()]
    assert cluster.wait(first, "FAILED", 120)["ExitCode"] == "2:0"  # there is no start checkpoint
    for job in rest:
        cluster.wait(job, "CANCELLED", 60)

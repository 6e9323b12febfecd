"""A dry batch takes the right number of ranks and microbatches, and its outcome is explained."""

from pathlib import Path

import pytest

from conf.composition.compose import compose_run_config
from conf.schema import RunConfig
from launch.preflight import dry_batch
from launch.preflight.dry_batch import DryBatchOutcome, check_dry_batch, count_dry_ranks, count_microbatches, find_cause
from launch.preflight.runner import Finding, Gpu, Result, TrainingJob
from tests.helpers.layouts import PP2, PP2_INTERLEAVED, TP2_PP2, TP4
from tests.helpers.toy_data import ToyData, tokens_of

GPU = Gpu("H100", total_bytes=int(80e9), free_bytes=int(79e9))
MEASURED = {
    "world_size": 4,
    "num_microbatches": 2,
    "micro_batch_size": 1,
    "sequence_length": 4096,
    "step_seconds": 1.5,
    "heldout_seconds": None,
    "peak_memory_bytes": 50e9,
    "device_memory_bytes": 80e9,
    "is_finite": True,
    "compiled_kernels": 0,
    "compile_seconds": 0.0,
}


def compose(*extra: str) -> RunConfig:
    paths = ["data.train=t", "data.tokenizer=t", "init_from=i", "run.name=r"]
    return compose_run_config(["experiment=nld_8b_joint", *paths, *extra])


def make_job(num_gpus: int, *extra: str) -> TrainingJob:
    return TrainingJob(compose(*extra), nodes=4, gpus_per_node=8, gpus=[GPU] * num_gpus)


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "expected"),
    [
        (0, TP4, 0),
        (3, TP4, 0),
        (7, TP4, 4),
        (8, TP4, 8),
        (0, (*TP2_PP2, "runtime=cpu"), 4),
    ],
)
def test_a_dry_batch_takes_whole_copies_of_the_model(num_gpus: int, overrides: tuple[str, ...], expected: int) -> None:
    assert count_dry_ranks(make_job(num_gpus, *overrides)) == expected


@pytest.mark.parametrize(("parallel", "expected"), [(TP4, 1), (TP2_PP2, 2), (PP2_INTERLEAVED, 4)])
def test_microbatches_fill_the_pipeline(parallel: tuple[str, ...], expected: int) -> None:
    assert count_microbatches(compose(*parallel), 32) == expected


def judge(monkeypatch: pytest.MonkeyPatch, outcome: DryBatchOutcome, num_gpus: int = 4) -> Finding:
    monkeypatch.setattr(dry_batch, "run_dry_batch", lambda *_: outcome)
    (finding,) = check_dry_batch(make_job(num_gpus, *TP4))
    return finding


def test_too_few_devices_are_a_warning_that_names_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = judge(monkeypatch, DryBatchOutcome(None, ""), num_gpus=3)
    assert finding.result is Result.warning and "needs 4 devices, and this machine has 3" in finding.detail


@pytest.mark.parametrize(
    ("change", "result", "named"),
    [
        ({}, Result.ok, "50 GB per rank of 80 GB"),
        ({"peak_memory_bytes": 79e9}, Result.warning, "close to the limit"),
        ({"is_finite": False}, Result.failed, "not finite"),
        (
            {"compiled_kernels": 9, "compile_seconds": 31.4},
            Result.ok,
            "9 kernels compiled in 31 s, saved for the run in",
        ),
    ],
)
def test_a_measurement_is_judged(monkeypatch: pytest.MonkeyPatch, change: dict, result: Result, named: str) -> None:
    finding = judge(monkeypatch, DryBatchOutcome(MEASURED | change, ""))
    assert finding.result is result and named in finding.detail


def test_a_crash_gives_its_cause_and_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    output = "Traceback ...\n  File x\nValueError: shapes differ\ntorch.distributed...ChildFailedError: \n"
    finding = judge(monkeypatch, DryBatchOutcome(None, output))
    log = Path(finding.detail.rpartition(": ")[2].rstrip(")"))
    assert finding.result is Result.failed and "ValueError: shapes differ" in finding.detail
    assert log.read_text(encoding="utf-8") == output
    log.unlink()


def test_memory_that_more_copies_would_share_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = judge(monkeypatch, DryBatchOutcome(None, "torch.OutOfMemoryError: CUDA out of memory."))
    assert finding.result is Result.warning and "over 8 copies" in finding.detail
    Path(finding.detail.partition("output: ")[2].partition(")")[0]).unlink()


def test_a_message_for_the_user_is_the_cause() -> None:
    assert find_cause("W1 noise\nerror: data.train holds no data\nFooError: x") == "error: data.train holds no data"
    assert find_cause("") == "it ended without output"


@pytest.mark.slow
def test_real_processes_leave_no_trace(toy_data: ToyData, tmp_path: Path) -> None:
    options = ["stage=joint", *PP2, tokens_of(10), f"run.root={tmp_path}", "run.name=run"]
    config = compose_run_config([*toy_data.overrides(), *options])
    outcome = dry_batch.run_dry_batch(config, num_ranks=2, num_microbatches=2)
    assert outcome.values is not None and outcome.values["is_finite"], outcome.output
    assert list(tmp_path.iterdir()) == []

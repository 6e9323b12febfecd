"""Bad steps of real runs on two data-parallel ranks: left out everywhere, counted, reported, and gone back from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint.layout import load_checkpoint_manifest, step_directory
from tests.distributed.test_checkpoint import OVERLAPPED, load_tensors
from tests.helpers.processes import kill_when, load_lines, run_ranks
from tests.helpers.toy_data import ToyData, tokens_of

STEPS, BATCH = 8, 8
BAD_STEP = 5
FIRST, LAST = (BAD_STEP - 1) * BATCH, BAD_STEP * BATCH - 1  # its samples; the first one is rank 0's
WORKER = "tests.helpers.poisoned_jobs"


def build_job(
    data: ToyData, root: Path, name: str, *extra: str, poison: Mapping[int, float | None], **more: Any
) -> Any:
    """Return the job of a run of eight steps. poison: see the worker."""
    where = [f"run.root={root}", f"run.name={name}", "stage=joint", "parallel=single", tokens_of(STEPS)]
    guard = ["guard.window=4", "guard.spike_factor=3", "data.heldout=null", "checkpoint.keep=10"]
    overrides = [*data.overrides(), *where, *guard, "checkpoint.every_steps=2", *extra]
    return {"overrides": overrides, "poison": poison, **more}


def run_jobs(root: Path, jobs: list[Any]) -> None:
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    run_ranks(2, WORKER, str(root / "jobs.json"))


@pytest.fixture(scope="module")
def root(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train runs that meet a bad step, one after another in one set of processes."""
    root = tmp_path_factory.mktemp("guarded")
    every = "checkpoint.every_steps=1"
    nan, spike, later = {FIRST: None}, {FIRST: 30.0}, (BAD_STEP + 1) * BATCH
    jobs = [
        build_job(toy_data, root, "nan", every, poison=nan),
        build_job(toy_data, root, "nan_overlapped", every, *OVERLAPPED, poison=nan),
        build_job(toy_data, root, "skip", every, "guard.spike_policy=skip", poison=spike),
        build_job(toy_data, root, "report", poison=spike),
        build_job(toy_data, root, "roll_back", "guard.spike_policy=roll_back", poison=spike),
        build_job(toy_data, root, "always_nan", "guard.max_nonfinite_steps=2", poison=dict.fromkeys(range(FIRST, 100))),
        build_job(
            *(toy_data, root, "two_spikes", "guard.spike_policy=skip", "guard.max_spikes=1"),
            poison={**spike, later: 30.0},
        ),
    ]
    run_jobs(root, jobs)
    return root


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in load_lines(run_dir, "event") if line["event"] == name]


def same_tensors(run_dir: Path, step: int, other: int) -> bool:
    """Return whether weights and optimizer state of two checkpoints of a run are the same, bit for bit."""
    one, two = (load_tensors(step_directory(run_dir, number)) for number in (step, other))
    return all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())


@pytest.mark.parametrize("run", ["nan", "nan_overlapped"])
def test_a_step_that_is_nan_on_one_rank_is_left_out_on_all(root: Path, run: str) -> None:
    train = load_lines(root / run, "train")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["skipped"] for line in train] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert [line["nonfinite_steps"] for line in train] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert same_tensors(root / run, BAD_STEP - 1, BAD_STEP)
    assert not same_tensors(root / run, BAD_STEP, BAD_STEP + 1)
    (event,) = events(root / run, "nonfinite")
    assert (event["step"], event["sample_first"], event["sample_last"]) == (BAD_STEP, FIRST, LAST)


def test_overlapped_communication_leaves_a_step_out_in_the_same_way(root: Path) -> None:
    plain, overlapped = (load_lines(root / run, "train") for run in ("nan", "nan_overlapped"))
    for mine, its in zip(overlapped, plain, strict=True):
        assert mine["loss"] == (None if its["loss"] is None else pytest.approx(its["loss"], rel=1e-6))


def test_a_spike_is_reported_or_its_update_left_out(root: Path) -> None:
    for run, skipped in (("report", 0), ("skip", 1)):
        assert [line["skipped"] for line in load_lines(root / run, "train")] == [0, 0, 0, 0, skipped, 0, 0, 0]
        (event,) = events(root / run, "spike")
        assert (event["step"], event["sample_first"], event["sample_last"]) == (BAD_STEP, FIRST, LAST)
    assert same_tensors(root / "skip", BAD_STEP - 1, BAD_STEP)


def test_after_a_roll_back_the_bad_samples_are_not_seen_again(root: Path) -> None:
    run_dir = root / "roll_back"
    (event,) = events(run_dir, "rollback")
    assert (event["step"], event["sample_first"], event["sample_last"]) == (BAD_STEP - 1, FIRST, LAST)
    train = load_lines(run_dir, "train")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["skipped"] for line in train] == [0] * STEPS
    assert load_checkpoint_manifest(step_directory(run_dir, STEPS)).samples_seen == (STEPS + 1) * BATCH
    assert load_checkpoint_manifest(step_directory(run_dir, STEPS)).guard["spikes"] == 1


def test_bad_steps_end_the_run_once_there_are_too_many(root: Path) -> None:
    for run, key in (("always_nan", "guard.max_nonfinite_steps"), ("two_spikes", "guard.max_spikes")):
        messages = {(root / run / f"error_rank{rank}.txt").read_text() for rank in (0, 1)}
        assert len(messages) == 1
        assert key in messages.pop()
    assert [line["step"] for line in load_lines(root / "always_nan", "train")][-1] <= BAD_STEP + 1


@pytest.mark.slow
def test_killed_after_a_roll_back_a_run_ends_as_if_it_had_not_been(toy_data: ToyData, root: Path) -> None:
    """Killed between going back and the next checkpoint, it meets the spike again and goes back again."""
    job = build_job(toy_data, root, "killed", "guard.spike_policy=roll_back", poison={FIRST: 30.0}, slow_rank=1)
    (root / "jobs.json").write_text(json.dumps([job]), encoding="utf-8")
    kill_when("went_back", root / "killed", 2, WORKER, [str(root / "jobs.json")])
    assert not step_directory(root / "killed", BAD_STEP + 1).exists()
    run_jobs(root, [job])
    step_dirs = [step_directory(root / run, STEPS) for run in ("roll_back", "killed")]
    one, two = map(load_tensors, step_dirs)
    assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())
    manifests = [load_checkpoint_manifest(step_dir) for step_dir in step_dirs]
    assert manifests[0].guard == manifests[1].guard
    assert manifests[0].samples_seen == manifests[1].samples_seen


@pytest.mark.slow
def test_a_slow_rank_is_named(toy_data: ToyData, tmp_path: Path) -> None:
    job = build_job(toy_data, tmp_path, "slow", tokens_of(30), poison={}, slow_rank=1)
    run_jobs(tmp_path, [job])
    (event, *_) = events(tmp_path / "slow", "straggler")
    assert event["message"].startswith("rank 1 takes ")

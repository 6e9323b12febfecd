"""Ranks that differ are chosen; what cannot be simulated is one message."""

from pathlib import Path

import pytest

from conf.composition.compose import compose_size
from conf.system.errors import ConfigError, UserError
from launch.simulate import fake_machine
from launch.simulate.__main__ import check_picture
from launch.simulate.job import shorten_step, simulate_job
from launch.simulate.ranks import find_distinct_ranks, parse_ranks

LAYOUT = ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [0]),
        (["parallel.pipeline_parallel=4"], [0, 16, 32, 48]),
        (["parallel.context_parallel=4"], [0, 2, 4, 6]),
        (["parallel.pipeline_parallel=2", "parallel.context_parallel=2"], [0, 32, 34]),
    ],
)
def test_one_rank_of_each_kind(overrides: list[str], expected: list[int]) -> None:
    parallel = compose_size(["experiment=nld_14b_joint", *LAYOUT, *overrides]).parallel
    assert find_distinct_ranks(parallel, 64) == expected
    assert parse_ranks("distinct", parallel, 64) == expected


def test_given_ranks_are_taken_and_checked() -> None:
    parallel = compose_size(["experiment=nld_14b_joint"]).parallel
    assert parse_ranks("17,0,17", parallel, 256) == [0, 17]
    with pytest.raises(UserError, match="ranks of 256 GPUs are 0 to 255"):
        parse_ranks("0,256", parallel, 256)
    with pytest.raises(UserError, match="give `distinct`, or numbers"):
        parse_ranks("first", parallel, 256)


@pytest.mark.parametrize(
    ("overrides", "microbatches"),
    [
        ([], 2),
        (["parallel.pipeline_parallel=4"], 4),
        (["parallel.pipeline_parallel=4", "parallel.virtual_pipeline_parallel=2"], 8),
        (["train.global_batch_size=32"], 1),
    ],
)
def test_a_step_fills_the_pipeline_and_is_not_longer_than_the_jobs(overrides: list[str], microbatches: int) -> None:
    config = compose_size(["experiment=nld_14b_joint", *overrides])
    shortened = shorten_step(config, 256, None)
    copies = 256 // config.parallel.model_parallel
    assert shortened.train.global_batch_size == microbatches * copies * config.train.micro_batch_size


def test_what_cannot_run_is_refused_before_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_size(["experiment=nld_14b_joint"])
    with pytest.raises(ConfigError, match="100 ranks are not a multiple"):
        simulate_job(config, 100)
    with pytest.raises(UserError, match=r"precision\.fp8=tensorwise needs Transformer Engine.*fake tensors"):
        simulate_job(compose_size(["experiment=nld_14b_joint", "precision=fp8"]), 256)
    monkeypatch.setattr(fake_machine, "find_obstacle", lambda: "no C compiler for cuda_stub.c: install cc")
    with pytest.raises(UserError, match=r"no C compiler for cuda_stub\.c: install cc. launch\.plan calculates"):
        simulate_job(config, 256)


def test_a_picture_that_cannot_be_written_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    check_picture(tmp_path / "new" / "memory.png")
    for path, message in ((tmp_path / "memory.jpg", r"ends in \.png"), (tmp_path / "a.png", "cannot be written")):
        (tmp_path / "a.png").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            check_picture(path)

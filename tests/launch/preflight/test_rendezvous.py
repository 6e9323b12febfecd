"""The endpoint of a job is found, and whether its port is free."""

import os
import socket
from pathlib import Path

import pytest

from conf.composition.compose import compose_run_config
from conf.system.errors import UserError
from launch.preflight import rendezvous
from launch.preflight.rendezvous import check_ports, find_rendezvous
from launch.preflight.runner import Finding, Result, TrainingJob

ROOT = Path(__file__).parents[3]
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RDZV_ENDPOINT", "SLURM_JOB_ID")


def check(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Finding:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    overrides = ["experiment=nld_8b_ar", "data.train=t", "data.tokenizer=t", "init_from=i"]
    (finding,) = check_ports(TrainingJob(compose_run_config(overrides), nodes=1, gpus_per_node=8))
    return finding


@pytest.fixture
def taken_port() -> object:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen(1)
        yield other.getsockname()[1]


def test_an_occupied_port_fails_and_names_the_variable(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    for name, value in (("MASTER_PORT", f"{taken_port}"), ("RDZV_ENDPOINT", f"localhost:{taken_port}")):
        finding = check(monkeypatch, **{name: value})
        assert finding.result is Result.failed
        assert str(taken_port) in finding.detail and f"set {name}" in finding.detail


def test_an_occupied_default_is_a_warning(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    monkeypatch.setattr(rendezvous, "TORCHRUN_PORT", taken_port)
    finding = check(monkeypatch)
    assert finding.result is Result.warning and "launch/local.sh takes another one" in finding.detail


def test_a_free_port_and_any_port_are_fine(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    assert check(monkeypatch, RDZV_ENDPOINT="localhost:0").result is Result.ok
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    assert check(monkeypatch, MASTER_PORT=str(port)).result is Result.ok


def test_a_meeting_on_another_machine_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = check(monkeypatch, MASTER_ADDR="192.0.2.1", MASTER_PORT="29500")  # RFC 5737: nobody's
    assert finding.result is Result.warning and "another machine" in finding.detail


def test_a_slurm_job_meets_where_the_launcher_says() -> None:
    assert find_rendezvous({"SLURM_JOB_ID": "40012"}).port == 15000 + 40012 % 15000
    assert "15000 + SLURM_JOB_ID % 15000" in (ROOT / "launch" / "rank.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["", "http", "70000", "-1"])
def test_what_is_no_port_is_one_message(text: str) -> None:
    with pytest.raises(UserError, match="MASTER_PORT"):
        find_rendezvous({**os.environ, "MASTER_PORT": text})

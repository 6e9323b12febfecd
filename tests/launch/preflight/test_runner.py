"""Each check finds what is wrong with a toy run."""

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from conf.composition.compose import compose_run_config
from launch.preflight import environment
from launch.preflight.__main__ import CHECKS
from launch.preflight.runner import Finding, Result, TrainingJob, run_checks
from pretrain.run.run_folder import lock_run_folder
from tests.helpers.stored import write_dataset
from tests.helpers.toy_data import ToyData, tokens_of


def check(data: ToyData, root: Path, *extra: str, ranks: int = 1) -> list[Finding]:
    """Return all findings but those of the dry batch."""
    overrides = [*data.overrides(), "stage=joint", tokens_of(10), f"run.root={root}", "run.name=run", *extra]
    job = TrainingJob(compose_run_config(overrides), nodes=1, gpus_per_node=ranks)
    return [finding for found in run_checks(job, CHECKS, lambda name: None) for finding in found]


def details_of(findings: list[Finding], result: Result) -> dict[str, str]:
    """Return the details of findings with this result, by check."""
    return {finding.check: finding.detail for finding in findings if finding.result is result}


@pytest.fixture(autouse=True)
def free_port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Use a free port, because 29500 may be in use on this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    return port


def test_a_run_that_can_start_has_nothing_to_fix(toy_data: ToyData, tmp_path: Path) -> None:
    findings = check(toy_data, tmp_path)
    assert {finding.result for finding in findings} == {Result.ok}
    assert {finding.check for finding in findings} == {check.name for check in CHECKS}
    assert list(tmp_path.iterdir()) == []  # no file is left over


@pytest.mark.parametrize(
    ("change", "where", "named"),
    [
        ("parallel.tensor_parallel=2", "configuration", "nproc_per_node=2"),
        ("data.tokenizer=nowhere", "tokenizer", "nowhere"),
        ("model.vocab_size=200", "tokenizer", "model.vocab_size=200"),
        ("data.train=nowhere", "training data", "nowhere"),
        ("data.heldout=nowhere", "held-out data", "nowhere"),
        ("init_from=nowhere", "start", "nowhere"),
        ("checkpoint.keep=1000000", "disk space", "lower checkpoint.keep"),
    ],
)
def test_what_is_wrong_fails_where_it_is_looked_at(
    toy_data: ToyData, tmp_path: Path, change: str, where: str, named: str
) -> None:
    failures = details_of(check(toy_data, tmp_path, change), Result.failed)
    assert list(failures) == [where] and named in failures[where]


def test_each_broken_source_is_named(toy_data: ToyData, tmp_path: Path) -> None:
    shutil.copytree(toy_data.train, tmp_path / "cut")
    tokens = next((tmp_path / "cut").glob("*.bin"))
    tokens.write_bytes(tokens.read_bytes()[:-2])
    other = write_dataset(tmp_path / "other", [[[[5, 6, 7]] * 200]])
    blend = "data.train={a:{path:%s,weight:1},b:{path:%s,weight:1},c:{path:%s,weight:1},d:{path:nowhere,weight:1}}"
    findings = check(toy_data, tmp_path, blend % (toy_data.train, tmp_path / "cut", other))
    failures = [finding.detail for finding in findings if finding.result is Result.failed]
    assert [detail[0] for detail in failures] == ["b", "c", "d"]
    assert "bytes" in failures[0] and "was tokenised with tokenizer" in failures[1]
    assert "nowhere" in failures[2]
    assert "training data" in details_of(findings, Result.warning)["start"]


def test_reading_data_more_than_once_is_a_warning(toy_data: ToyData, tmp_path: Path) -> None:
    warnings = details_of(check(toy_data, tmp_path, "train.tokens=1e6"), Result.warning)
    assert list(warnings) == ["training data"] and "it repeats" in warnings["training data"]


def test_missing_and_trained_on_heldout_data_are_warnings(toy_data: ToyData, tmp_path: Path) -> None:
    missing = details_of(check(toy_data, tmp_path, "data.heldout=null"), Result.warning)
    trained_on = details_of(check(toy_data, tmp_path, f"data.heldout={toy_data.train}"), Result.warning)
    assert "not given" in missing["held-out data"] and "not held out" in trained_on["held-out data"]


def test_a_folder_in_use_and_one_that_cannot_be_written_fail(toy_data: ToyData, tmp_path: Path) -> None:
    with lock_run_folder(tmp_path / "run"):
        findings = check(toy_data, tmp_path)
    assert "is in use" in details_of(findings, Result.failed)["run folder"]
    (tmp_path / "file").touch()
    failures = details_of(check(toy_data, tmp_path / "file"), Result.failed)
    assert "run.root" in failures["run folder"]


def test_a_package_of_another_version_stops_only_what_needs_it(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "read_requirements", lambda *_: ["pytest<2"])
    findings = check(toy_data, tmp_path)
    assert "make setup" in details_of(findings, Result.failed)["packages"]
    assert "packages" in details_of(findings, Result.warning)["kernels"]
    assert "run folder" in details_of(findings, Result.ok)


def test_an_unforeseen_error_is_a_failure_of_its_check_alone(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: Any) -> Any:
        raise RuntimeError("no disk")

    monkeypatch.setattr(shutil, "disk_usage", break_down)
    findings = check(toy_data, tmp_path)
    assert "RuntimeError: no disk" in details_of(findings, Result.failed)["disk space"]
    assert "kernels" in details_of(findings, Result.ok)


def test_without_a_device_a_gpu_run_learns_what_is_not_known(toy_data: ToyData, tmp_path: Path) -> None:
    findings = check(toy_data, tmp_path, "runtime=default")
    warnings = details_of(findings, Result.warning)
    assert "on a GPU node" in warnings["devices"]
    assert "transformer_engine" in warnings["kernels"] and "flex" in warnings["kernels"]

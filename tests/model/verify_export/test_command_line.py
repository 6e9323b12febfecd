"""The command line, the report it signs off, and the memory it takes."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.convert.safetensors_writer import TensorSpec, encode_header
from model.verify_export.__main__ import main
from model.verify_export.verification_report import compute_digest
from model.verify_export.weights import expected_shapes
from tests.helpers.edit_exports import edit_json, flip_byte
from tests.helpers.processes import ROOT, rank_environment
from tests.helpers.tiny_checkpoints import tiny_model_config

BIG_BYTES, MORE_BYTES = 600 * 2**20, 64 * 2**20


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_one_line_per_check_and_one_for_the_whole(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, written / "export")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert all(line.startswith("pass ") for line in lines[:-1]) and len(lines) >= 17
    assert lines[-1].startswith(f"pass: export ({len(lines) - 1} pass); report digest ")


def test_a_failure_says_what_and_what_to_do(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_byte(export / "model.safetensors", -1)
    status, out, _ = run(capsys, export)
    assert status == 1
    assert out.startswith(
        "fail checksums          changed: model.safetensors -> fetch the export again; if you changed"
    )
    assert "\nfail: export (1 fail, " in out


def test_warnings_are_said_at_the_end_and_count_if_strict(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (export / "SHA256SUMS").unlink()
    status, out, _ = run(capsys, export)
    assert status == 0 and "\npass with warnings: export (" in out
    assert run(capsys, export, "--strict")[0] == 1


def test_the_report_holds_checks_files_and_versions_and_its_digest_can_be_recomputed(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reports" / "report.json"
    status, out, _ = run(capsys, export, "--report", path)
    report = json.loads(path.read_text())
    assert status == 0 and report["digest"] in out
    assert report["outcome"] == "pass" and {check["outcome"] for check in report["checks"]} == {"pass"}
    assert report["tool"]["name"] == "model.verify_export" and report["versions"].keys() >= {"python", "torch"}
    assert report["files"].keys() == {path.name for path in export.iterdir()}
    for name, values in report["files"].items():
        content = (export / name).read_bytes()
        assert values == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    digest = report.pop("digest")
    text = json.dumps(report, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    assert str(tmp_path) not in path.read_text()


def test_json_is_the_report_and_nothing_else(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, written / "shards", "--json", "--skip-values")
    assert (status, err) == (0, "")
    assert json.loads(out)["counts"]["skip"] == 1


def test_an_export_is_compared_with_an_earlier_report(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    assert run(capsys, export, "--report", path)[0] == 0
    status, out, _ = run(capsys, export, "--check-report", path)
    assert status == 0 and "every file is as signed off at" in out
    (export / "README.md").write_text("new")
    (export / "SHA256SUMS").unlink()  # as an attacker would
    status, out, _ = run(capsys, export, "--check-report", path)
    assert status == 1 and "not as signed off at" in out and "README.md, SHA256SUMS" in out
    edit_json(path, outcome="fail")
    status, _, err = run(capsys, export, "--check-report", path)
    assert status == 2 and "is not as it was written: its digest differs" in err
    signed = {"format_version": 1, "time": "now", "outcome": "pass", "files": {}}
    for content in ({}, signed | {"files": {"a": 3}}, signed | {"files": {"a": {"sha256": 3}}}, signed | {"time": 3}):
        path.write_text(json.dumps(content | {"digest": compute_digest(content)}))
        status, _, err = run(capsys, export, "--check-report", path)
        assert status == 2 and "is not a report" in err


def test_bad_input_is_one_message(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "nowhere"], "is not a directory: give the folder of an export"),
        ([export, "--report", export / "report.json"], "is inside the export: choose a place outside of it"),
        ([export, "--report", tmp_path], "is a folder: give a file name"),
        ([export, "--check-report", tmp_path / "none.json"], "there is no report"),
        ([export, "--report", export.parent / "file" / "r.json"], "file"),
    ]
    (export.parent / "file").touch()
    for arguments, message in cases:
        status, out, err = run(capsys, *arguments)
        assert status == 2 and message in err and err.startswith("error: ") and not out, (arguments, err)
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_sums_are_written_on_request(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (export / "SHA256SUMS").unlink()
    status, out, _ = run(capsys, export)
    assert status == 0 and out.startswith("warn checksums")
    status, out, _ = run(capsys, export, "--write-sums")
    assert status == 0 and out.startswith("pass checksums")


MEASURE = """
import sys
from pathlib import Path
from model.convert.__main__ import peak_resident_bytes
from model.verify_export.verification import verify_export
small, big = map(Path, sys.argv[1:])
verify_export(small)
before = peak_resident_bytes()
found = verify_export(big)
assert [check.name for check in found.checks if check.outcome == "fail"] == ["checksums"], found.checks
print(peak_resident_bytes() - before)
"""


def test_memory_does_not_grow_with_the_export(written: Path, export: Path) -> None:
    """A model of 600 MB, most of it one tensor; zeros that take no room on disk."""
    vocab_size = BIG_BYTES // (2 * 2 * 48)
    edit_json(export / "config.json", vocab_size=vocab_size)
    shapes = expected_shapes(tiny_model_config(vocab_size=vocab_size))
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    with open(export / "model.safetensors", "wb") as file:
        file.write(encode_header(specs))
        file.truncate(file.tell() + sum(spec.num_bytes for spec in specs))
    command = [sys.executable, "-c", MEASURE, str(written / "export"), str(export)]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MORE_BYTES, done.stdout

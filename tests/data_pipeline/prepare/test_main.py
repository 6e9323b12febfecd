"""The command prepares what the configuration names and explains itself in one line."""

import subprocess
import sys
from pathlib import Path

from data_pipeline.storage.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipeline.prepare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_own_groups_are_prepared_and_reported(workshop, records) -> None:
    workshop.write("a.jsonl", records)
    group = workshop.folder / "configs" / "data" / "web.yaml"
    group.parent.mkdir(parents=True)
    group.write_text(
        f"tokenizer: {workshop.tokenizer_dir}\n"
        f"train: {{web: {{path: {workshop.output}, input: {{files: {workshop.folder / 'in'}}}}}}}\n"
    )
    done = run("--config-dir", str(group.parents[1]), "data=web", "data.prepare.workers=1")
    assert done.returncode == 0, done.stderr
    assert "data.train.web" in done.stdout
    assert f"{load_manifest(workshop.output).tokens:,}" in done.stdout


def test_what_cannot_work_is_one_line(workshop) -> None:
    done = run("data=text", f"data.tokenizer={workshop.tokenizer_dir}", "data.train.text.input.files=/nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        "error: data.heldout.text: /nowhere does not exist: give a file, a folder or a glob of .jsonl, .jsonl.gz, "
        ".jsonl.zst, .parquet\n"
    )


def test_help_shows_commands() -> None:
    assert "python -m data_pipeline.prepare data=text" in run("--help").stdout

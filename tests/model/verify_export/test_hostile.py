"""Exports made to break or to mislead their reader: each ends in a check that fails, in little time and memory."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from model.verify_export.check import CheckOutcome
from model.verify_export.verification import verify_export
from tests.helpers.edit_exports import edit_json
from tests.helpers.export_checks import assert_found, find, outcomes
from tests.helpers.processes import ROOT, rank_environment

MODELING = "modeling_nemotron_labs_diffusion.py"
WEIGHTS = "model.safetensors"
DEEP = 200_000
NUM_LAYERS = 300_000
MORE_BYTES = 64 * 2**20


def write_header(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def make_offsets_fractions(path: Path) -> None:
    """Write the same header, but with 4.0 where 4 was."""
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    for tensor in header.keys() - {"__metadata__"}:
        header[tensor]["data_offsets"] = [float(place) for place in header[tensor]["data_offsets"]]
    write_header(path, json.dumps(header).encode())
    with path.open("ab") as file:
        file.write(content[length:])


def put_custom_generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('executed')\n")


HOSTILE: list[tuple[str, Callable[[Path], object], str]] = [
    ("config keys", lambda d: (d / "config.json").write_text("[" * DEEP), "nested too deep"),
    ("generation config", lambda d: (d / "generation_config.json").write_text('{"a":' * DEEP), "nested too deep"),
    ("tokenizer", lambda d: (d / "tokenizer_config.json").write_text("[" * DEEP), "cannot be read"),
    ("weight files", lambda d: write_header(d / WEIGHTS, b"[" * DEEP), "damaged header"),
    ("weight files", lambda d: make_offsets_fractions(d / WEIGHTS), "damaged header"),
    ("code is complete", lambda d: (d / MODELING).write_text("x=" + "-" * DEEP + "1"), f"{MODELING} is not Python"),
    ("code is complete", lambda d: (d / MODELING).write_text("x=" + "a." * DEEP + "b"), f"{MODELING} is not Python"),
    ("code is complete", put_custom_generate, "custom_generate/generate.py would run"),
    ("model", lambda d: edit_json(d / "config.json", attn_implementation="them/kernel"), "attn_implementation 'them/k"),
    ("model", lambda d: edit_json(d / "config.json", _attn_implementation={"": "them/kernel"}), "_attn_implementation"),
    (
        "generation config",
        lambda d: edit_json(d / "generation_config.json", watermarking_config=3),
        "generation_config.json cannot be loaded",
    ),
]


@pytest.mark.parametrize(("name", "damage", "detail"), HOSTILE)
def test_a_hostile_file_fails_its_check(export: Path, name: str, damage: Callable[[Path], object], detail: str) -> None:
    damage(export)
    assert_found(export, name, CheckOutcome.failed, detail)


def test_attention_that_needs_no_code_of_others_may_be_named(export: Path) -> None:
    edit_json(export / "config.json", attn_implementation="eager")
    assert find(verify_export(export), "model").outcome is CheckOutcome.passed


def test_a_pipe_is_never_opened(export: Path) -> None:
    """Opening it would wait for a writer."""
    (export / "config.json").unlink()
    os.mkfifo(export / "config.json")
    found = verify_export(export)
    assert find(found, "other files").detail == "not a regular file: config.json", outcomes(found)
    assert find(found, "content").outcome is CheckOutcome.skipped and found.has_failed


MEASURE = """
import sys
from pathlib import Path
from model.convert.__main__ import peak_resident_bytes
from model.verify_export.verification import verify_export
small, big = map(Path, sys.argv[1:])
verify_export(small)
before = peak_resident_bytes()
found = verify_export(big)
print(peak_resident_bytes() - before)
print([check.detail for check in found.checks if check.name in ("tensor names", "adapter linear_spec_lora")])
"""


def test_memory_does_not_grow_with_the_layers_that_config_json_names(
    written: Path, export: Path, adapter: Path
) -> None:
    folder = Path(shutil.copytree(adapter, export / "linear_spec_lora"))
    write_header(folder / "adapter_model.safetensors", b"{}")
    edit_json(export / "config.json", num_hidden_layers=NUM_LAYERS)
    command = [sys.executable, "-c", MEASURE, str(written / "export"), str(export)]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory, details = done.stdout.splitlines()
    assert int(memory) < MORE_BYTES
    assert f"config.json has {NUM_LAYERS} layers, the weights 39 tensors" in details and "has no tensor" in details

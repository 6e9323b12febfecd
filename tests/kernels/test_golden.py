"""What has become worse is found, and versions outside the range are a reason to skip in one line."""

import importlib.metadata
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch.simulate.device_kind import KINDS
from tests.kernels import golden
from tests.kernels.compiled import Kernel, count_blocks
from tests.kernels.golden import (
    TableRow,
    compare_table_rows,
    count_changes,
    find_newest_table,
    find_table,
    load_table,
    save_table,
)
from tests.kernels.judge import find_faults
from tests.kernels.processes import Outcome, describe_failure, describe_foreign, find_foreign_version

ROOT = Path(__file__).parents[2]
ROW = TableRow("attention/ar/x", "triton_tem_1", "warps=8 stages=3", 214, 0, 0, 131072, 1, 16)
KERNEL = Kernel("triton_tem_1", {}, 8, 3, 214, 0, 0, 131072, 1, 16, True, "sm_90a")


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({"spill_loads": 4}, "spills 0 / 4 bytes, not 0 / 0"),
        ({"blocks": 0}, "0 blocks fit a multiprocessor, not 1"),
        ({"tensor_core": 0}, "no tensor-core instructions are left"),
        ({"kernel": "triton_tem_2"}, "triton_tem_2 warps=8 stages=3: not in the table"),
    ],
)
def test_what_is_worse_is_reported(change: dict, reported: str) -> None:
    found = compare_table_rows([replace(ROW, **change)], [ROW])
    assert any(reported in line for line in found), found


def test_what_is_better_or_was_not_tried_is_not_reported_but_counted() -> None:
    before = [replace(ROW, spill_stores=8, blocks=1), replace(ROW, case="another")]
    better = replace(ROW, registers=200, blocks=2)
    assert compare_table_rows([better], before) == []
    assert count_changes([better], [before[0]]) == 2
    assert count_changes([ROW], [ROW]) == 0


def test_a_case_that_the_table_lacks_is_not_compared() -> None:
    assert compare_table_rows([ROW, replace(ROW, case="new")], [ROW]) == []


def test_a_kernel_of_the_table_that_is_gone_is_reported() -> None:
    [line] = compare_table_rows([ROW], [ROW, replace(ROW, kernel="gone")])
    assert "in the table, but not compiled" in line


def test_tables_are_read_as_written_and_another_torch_is_compared_with_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    assert find_newest_table("h100") is None
    for version in ("2.9.0", "2.11.0"):
        save_table(find_table("h100", version), [ROW, replace(ROW, case="attention/a")])
    path = find_newest_table("h100")
    assert path is not None and path.parent.name == "torch-2.11.0"
    assert load_table(path) == [replace(ROW, case="attention/a"), ROW]


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(error="Traceback\n  line\nRuntimeError: no valid triton configs"), "no valid triton configs"),
        (Outcome([]), "compiles no kernel"),
        (Outcome([replace(KERNEL, tensor_core=0)]), "multiplies without tensor cores"),
        (Outcome([replace(KERNEL, shared=240000, blocks=0)]), "needs 240000 bytes of shared memory"),
        (Outcome([replace(KERNEL, target="sm_90")]), "is for sm_90, not sm_90a"),
        (Outcome([replace(KERNEL, spill_stores=8)]), "spills 8 / 0 bytes"),
        (Outcome([KERNEL], None, {"output": 1e-4, "dkey": 2e-3}), "dkey differs by 2.0e-03"),
        (Outcome([KERNEL], None, {"output": float("nan")}), "output differs by nan"),
    ],
)
def test_every_kind_of_fault_is_found(outcome: Outcome, fault: str) -> None:
    assert any(fault in line for line in find_faults("h100", {"swiglu/x": outcome}))
    assert find_faults("h100", {"swiglu/x": Outcome([KERNEL], None, {"output": 1e-4})}) == []


@pytest.mark.parametrize("name", ["attention/x/small", "bench/torch's_tiles/8b"])
def test_what_is_not_shipped_may_spill(name: str) -> None:
    assert find_faults("h100", {name: Outcome([replace(KERNEL, spill_loads=64)])}) == []


def test_blocks_of_a_multiprocessor_are_bounded_by_registers_shared_memory_and_threads() -> None:
    kind = KINDS["h100"]
    assert count_blocks(kind, warps=8, registers=128, shared=0) == 2
    assert count_blocks(kind, warps=8, registers=129, shared=0) == 1
    assert count_blocks(kind, warps=4, registers=32, shared=100 << 10) == 2
    assert count_blocks(kind, warps=4, registers=32, shared=0) == 16
    assert count_blocks(kind, warps=1, registers=16, shared=0) == 32
    assert count_blocks(kind, warps=8, registers=64, shared=228 << 10) == 0


def test_versions_outside_the_range_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_foreign(Requirement("no-such-package==1")) is None
    assert describe_foreign(Requirement("torch>=2")) is None
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.99.0" if name == "torch" else installed(name))
    reason = find_foreign_version()
    assert reason is not None and reason.startswith("torch 2.99.0 is outside of ==2.") and "\n" not in reason
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "triton" else installed(name))
    assert str(find_foreign_version()).startswith("triton 9.9 is outside of")


@pytest.mark.parametrize(
    ("statement", "described"),
    [
        (
            "from launch.simulate.hooks import find_hook; find_hook('torch.cuda:gone')",
            "torch.cuda:gone is gone in torch ",
        ),
        ("import torch; torch.gone", "module fails: Traceback"),
    ],
)
def test_a_process_that_misses_a_hook_says_so_in_one_line(statement: str, described: str) -> None:
    command = [sys.executable, "-c", statement]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    text = describe_failure("module", done.stderr)
    assert text.startswith(described)
    assert ("\n" in text) == described.endswith("Traceback")

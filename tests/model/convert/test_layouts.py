"""Weights reach a live model in any layout, and come back from what megatron-core saved in any layout.

Each case goes: checkpoint -> sharded live model -> megatron-core's own save -> export, which must be, byte for byte,
the export of the directly converted checkpoint.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint

from conf.system.errors import UserError
from model.checkpoint.checksums import write_sums
from model.checkpoint.layout import (
    load_checkpoint_manifest,
    resolve_checkpoint,
    save_checkpoint_manifest,
    step_directory,
)
from model.convert.conversion import export_checkpoint, import_checkpoint
from model.convert.load_weights import load_hf_weights, load_megatron_weights
from model.convert.mapping import build_tensor_table
from model.convert.progress import Progress
from tests.helpers.processes import run_ranks
from tests.helpers.tiny_checkpoints import MASK_TOKEN, count_chunks, make_ministral3_vlm, tiny_model_config

# Which layout gets its weights from which kind of checkpoint, in which precision. Two ranks unless `single`.
FEW = [("tp2", "hf", "bf16"), ("pp2_interleaved", "megatron", "fp32")]
MANY = [
    (layout, source, dtype)
    for layout in ("single", "tp2", "tp2_sp", "pp2", "pp2_interleaved")
    for source, dtype in (("hf", "fp32"), ("megatron", "bf16"))
]


def export(run: Path, target: Path) -> bytes:
    export_checkpoint(run, target, Progress(), max_shard_bytes=10**9)
    return (target / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save `hf`; `imported`, made from it and cut for tp2; `expected`, the bytes of its export."""
    folder = tmp_path_factory.mktemp("layouts")
    make_ministral3_vlm(folder / "hf", dtype=torch.bfloat16)
    import_checkpoint(folder / "hf", folder / "imported", MASK_TOKEN, Progress(), tensor_parallel=2)
    (folder / "expected").write_bytes(export(folder / "imported", folder / "expected_export"))
    return folder


def save_with_megatron(folder: Path, cases: list[tuple[str, str, str]]) -> None:
    """Save each case's live model with megatron-core into the run folder run_of(case)."""
    sources = {"hf": str(folder / "hf"), "megatron": str(resolve_checkpoint(folder / "imported"))}
    for num_ranks in (1, 2):
        jobs = [
            {"source": sources[source], "run": str(run_of(folder, layout, source)), "layout": layout, "dtype": dtype}
            for layout, source, dtype in cases
            if (layout == "single") == (num_ranks == 1)
        ]
        if jobs:
            (folder / "jobs.json").write_text(json.dumps(jobs))
            run_ranks(num_ranks, "tests.helpers.reshard_jobs", str(folder / "jobs.json"))


def run_of(folder: Path, layout: str, source: str) -> Path:
    return folder / f"{layout}_{source}"


def assert_exports_alike(folder: Path, run: Path) -> None:
    shutil.copytree(folder / "imported" / "tokenizer", run / "tokenizer")
    step = run / "checkpoints" / "step_00000000"
    save_checkpoint_manifest(step, load_checkpoint_manifest(resolve_checkpoint(folder / "imported")))
    write_sums(step)
    assert export(run, run / "export") == (folder / "expected").read_bytes()


def test_tensor_and_interleaved_pipeline_layouts_give_the_same_export(folder):
    save_with_megatron(folder, FEW)
    for layout, source, _ in FEW:
        assert_exports_alike(folder, run_of(folder, layout, source))
    few, many = (count_chunks(step_directory(run_of(folder, *run[:2]), 0)) for run in (FEW[1], FEW[0]))
    assert many == count_chunks(step_directory(folder / "imported", 0))
    assert many > few


@pytest.mark.slow
def test_every_layout_gives_the_same_export(folder, tmp_path):
    for name in ("hf", "imported", "expected"):
        (tmp_path / name).symlink_to(folder / name)
    save_with_megatron(tmp_path, MANY)
    for layout, source, _ in MANY:
        assert_exports_alike(tmp_path, run_of(tmp_path, layout, source))


def test_another_model_is_refused_before_anything_is_read(folder):
    other = tiny_model_config(num_layers=2, factor=0.25)
    step = resolve_checkpoint(folder / "imported")
    for load, source in ((load_hf_weights, folder / "hf"), (load_megatron_weights, step)):
        with pytest.raises(UserError, match="holds another model") as caught:
            load([], source, other)
        assert "model.num_layers: 4 there, 2 requested" in str(caught.value)
        assert "model.rope.factor: 16.0 there, 0.25 requested" in str(caught.value)


def test_megatron_core_accepts_a_converted_checkpoint(folder):
    step = str(resolve_checkpoint(folder / "imported"))
    assert check_is_distributed_checkpoint(step)
    assert dist_checkpointing.load_common_state_dict(step) == {}
    stored = dist_checkpointing.load_tensors_metadata(step)
    table = build_tensor_table(tiny_model_config())
    assert {key: tuple(value.global_shape) for key, value in stored.items()} == {
        entry.megatron: entry.megatron_shape for entry in table
    }

"""The dry batch runs the trainer on the largest shapes and touches nothing but the folder it is given."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from conf.composition.compose import compose_run_config, load_run_config
from pretrain.dry_batch import REPORT_FILE, LongestBlend
from pretrain.run.run_data import open_data
from pretrain.run.run_folder import write_out
from tests.helpers.processes import ROOT, rank_environment
from tests.helpers.toy_data import ToyData, tokens_of


def test_two_steps_are_measured_in_a_folder_of_their_own(toy_data: ToyData, tmp_path: Path) -> None:
    overrides = [*toy_data.overrides(), "stage=joint", tokens_of(10), f"run.root={tmp_path}", "run.name=run"]
    config = compose_run_config([*overrides, "init_from=nowhere"])
    folder = tmp_path / "dry"
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(write_out(config), encoding="utf-8")
    assert load_run_config(path) == config  # nothing is lost on the way
    command = [sys.executable, "-m", "pretrain.dry_batch", str(path), "--microbatches", "2"]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["is_finite"] and len(report["losses"]) == 2
    assert (report["world_size"], report["num_microbatches"], report["micro_batch_size"]) == (1, 2, 2)
    assert min(report["step_seconds"], report["heldout_seconds"]) > 0 and report["peak_memory_bytes"] > 1e8
    assert list(tmp_path.iterdir()) == [folder]  # no run folder


def test_the_longest_sequences_are_one_document_each(toy_data: ToyData, tmp_path: Path) -> None:
    overrides = [*toy_data.overrides(), "stage=joint", tokens_of(10), f"run.root={tmp_path}", "run.name=run"]
    blend = open_data(compose_run_config(overrides)).train
    longest, real = LongestBlend(blend).build_batch([0, 1]), blend.build_batch([0, 1])
    assert torch.equal(longest.tokens, real.tokens)
    assert longest.document_ids.unique().tolist() == [0]
    assert longest.block_ids[0].unique().tolist() == [0, 1, 2, 3]  # 64 rows, blocks of 16
    assert longest.loss_mask.all() and not longest.block_padding.any()

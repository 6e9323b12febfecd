"""The command line: direction from what FROM is, one clear message for what cannot work, nothing lost by accident."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conf.system.errors import UserError
from model.checkpoint.layout import load_checkpoint_manifest, resolve_checkpoint, save_checkpoint_manifest
from model.convert.__main__ import main, parse_size
from model.convert.dist_reader import DistReader
from tests.helpers.tiny_checkpoints import count_chunks, make_ministral3_vlm

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    make_ministral3_vlm(folder / "hf")
    assert main(["--from", str(folder / "hf"), "--to", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def convert(source, target, *options):
    return main(["--from", str(source), "--to", str(target), *options])


def refuse(capsys, message, *arguments):
    capsys.readouterr()
    assert convert(*arguments) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_python_dash_m_converts_and_says_what_it_did(saved, tmp_path):
    command = [sys.executable, "-m", "model.convert", "--from", str(saved / "hf"), "--to", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for words in ("27 tensors", "120,240 parameters", "peak memory", "read back and compared", "15 entries"):
        assert words in done.stderr.replace("\n", " ")
    assert resolve_checkpoint(tmp_path / "run").name == "step_00000000"


def test_help_needs_no_torch_and_a_conversion_no_transformers(saved, tmp_path):
    script = (
        "import sys\nfrom model.convert.__main__ import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as done:\n    status = done.code\n"
        "print(status, sorted({'torch', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    for arguments, loaded in ((["--help"], []), (["--from", saved / "hf", "--to", tmp_path / "run"], ["torch"])):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"0 {loaded}"


def test_the_direction_follows_from_the_source(saved, tmp_path):
    assert convert(saved / "run", tmp_path / "from_run") == 0
    assert convert(resolve_checkpoint(saved / "run"), tmp_path / "from_step") == 0
    assert convert(tmp_path / "from_run", tmp_path / "back") == 0
    for name in ("from_run", "from_step"):
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == "nemotron_labs_diffusion"
    assert load_checkpoint_manifest(resolve_checkpoint(tmp_path / "back")).stage == "import"


def test_a_layout_cuts_the_tensors_for_its_ranks(saved, tmp_path):
    assert convert(saved / "hf", tmp_path / "tp2", "--parallel", "tensor_parallel=2") == 0
    one, two = (count_chunks(resolve_checkpoint(run)) for run in (saved / "run", tmp_path / "tp2"))
    # Embedding, head and per layer four projections are split; fc1 into gate and up parts of both ranks.
    assert (one, two) == (27, 27 + 2 + 4 * (3 + 3))


def test_options_choose_dtype_and_shard_size(saved, tmp_path):
    assert convert(saved / "hf", tmp_path / "run", "--dtype", "fp32") == 0
    assert (
        DistReader(resolve_checkpoint(tmp_path / "run")).read("decoder.final_layernorm.weight").dtype is torch.float32
    )
    assert convert(tmp_path / "run", tmp_path / "nld", "--max-shard-size", "50KB") == 0
    assert len(list((tmp_path / "nld").glob("model-*.safetensors"))) > 2


def test_a_layout_that_does_not_divide_the_model_is_refused(saved, tmp_path, capsys):
    target = tmp_path / "x"
    refuse(capsys, "parallel.tensor_parallel=4", saved / "hf", target, "--parallel", "tensor_parallel=4")
    refuse(capsys, "parallel.tensor_parallel", saved / "hf", target, "--parallel", "tensor_paralel=2")
    refuse(capsys, "give parallel.tensor_parallel=2", saved / "hf", target, "--parallel", "tp2")
    assert os.listdir(tmp_path) == []


def test_options_without_effect_are_refused(saved, tmp_path, capsys):
    target = tmp_path / "x"
    refuse(capsys, "--parallel has no effect", saved / "run", target, "--parallel", "tensor_parallel=2")
    refuse(capsys, "--mask-token has no effect", saved / "run", target, "--mask-token", "<x>")
    refuse(capsys, "--max-shard-size has no effect", saved / "hf", target, "--max-shard-size", "1GB")


def test_a_source_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    refuse(capsys, "nothing is not a directory", tmp_path / "nothing", tmp_path / "x")
    (tmp_path / "empty").mkdir()
    refuse(capsys, "holds no complete checkpoint", tmp_path / "empty", tmp_path / "x")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"")
    refuse(capsys, "has no config.json", tmp_path / "empty", tmp_path / "x")


def test_a_used_target_is_refused_and_an_earlier_conversion_replaced_on_request(folder, capsys):
    assert convert(folder / "run", folder / "nld") == 0
    (folder / "nld" / "marker").write_text("")
    refuse(capsys, "nld exists", folder / "run", folder / "nld")
    assert (folder / "nld" / "marker").exists()
    assert convert(folder / "run", folder / "nld", "--overwrite") == 0
    assert not (folder / "nld" / "marker").exists()
    assert convert(folder / "nld", folder / "run2") == 0
    assert convert(folder / "nld", folder / "run2", "--overwrite") == 0


def test_overwrite_spares_what_is_not_a_conversion(folder, capsys):
    step = resolve_checkpoint(folder / "run")
    manifest = load_checkpoint_manifest(step)
    manifest.stage = "ar"
    trained = shutil.copytree(folder / "run", folder / "trained")
    save_checkpoint_manifest(resolve_checkpoint(trained), manifest)
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.tex").write_text("years of work")
    for target in (trained, folder / "notes", folder / "hf"):
        source = folder / "run" if target == folder / "hf" else folder / "hf"
        refuse(capsys, "does not look like an earlier conversion", source, target, "--overwrite")
    assert (folder / "notes" / "thesis.tex").read_text() == "years of work"


def test_source_and_target_must_not_overlap(folder, capsys):
    for target in (folder / "hf", folder / "hf" / "megatron", folder):
        refuse(capsys, "overlap", folder / "hf", target, "--overwrite")


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refuse(capsys, "No space left on device", saved / "hf", tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_a_draft_adapter_beside_the_weights_is_mentioned(folder, capsys):
    (folder / "hf" / "linear_spec_lora").mkdir()
    assert convert(folder / "hf", folder / "x") == 0
    assert "linear_spec_lora/ is not converted" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("20 KB", 20000), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5TB", "-1", "0GB", "1.5GB"])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)

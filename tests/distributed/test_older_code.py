"""Runs, checkpoints, exports and drafters written by older code still resume, convert, load and decode.

The older code is the commit before files, words and configuration keys were renamed; it is taken from this repository's
history and run in a folder of its own with the same environment.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.helpers.processes import ROOT, load_lines, rank_environment
from tests.helpers.toy_data import CHAT_SEQUENCE_LENGTH, SEQUENCE_LENGTH

pytestmark = pytest.mark.slow

OLDER_COMMIT = "db8fe4c7"
NUM_STEPS, RESUMED_AT = 8, 4
DRAFTER_STEPS, DRAFTER_RESUMED_AT = 6, 4
MAKE_DATA = "from pathlib import Path; from tests.helpers.toy_data import make_toy_data; make_toy_data(Path({!r}))"


@dataclass(frozen=True)
class Older:
    """Point to what the older code wrote. folder: of its runs, data and export. source: its files."""

    folder: Path
    source: Path


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Older:
    """Write data, a joint run, an instruct run, their export and a drafter with the older code."""
    folder, source = tmp_path_factory.mktemp("older"), tmp_path_factory.mktemp("source")
    _extract(source)
    written = Older(folder, source)
    _python(source, "-c", MAKE_DATA.format(str(folder / "data")))
    for stage in ("joint", "sft"):
        _python(source, "-m", "pretrain.train", *run_overrides(folder, stage, folder / stage))
    _python(source, "-m", "model.convert", "--from", str(folder / "sft"), "--to", str(folder / "export"))
    _python(source, "-m", "lora.train", *drafter_overrides(folder, folder / "drafter", "train.peak_lr"))
    return written


def _extract(source: Path) -> None:
    found = subprocess.run(["git", "cat-file", "-e", f"{OLDER_COMMIT}^{{commit}}"], cwd=ROOT, check=False)
    if found.returncode:
        pytest.skip(f"commit {OLDER_COMMIT} is not in this clone's history (a shallow clone?)")
    archive = subprocess.run(["git", "archive", OLDER_COMMIT], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive, check=True)


def _python(source: Path, *arguments: str) -> None:
    """Run Python on the code in `source`; a failure shows its output."""
    environment = {**rank_environment(), "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=source, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{arguments} in {source} failed:\n{done.stdout[-3000:]}{done.stderr[-5000:]}"


def run_overrides(folder: Path, stage: str, run_dir: Path) -> list[str]:
    """Return the command line of a run on the older code's data; its keys have the same names in both."""
    chats = "_chats" if stage == "sft" else ""
    length = CHAT_SEQUENCE_LENGTH if chats else SEQUENCE_LENGTH
    return [
        *(f"stage={stage}", "model=tiny", "precision=fp32", "runtime=cpu", f"run.dir={run_dir}"),
        *(f"data.train={folder}/data/train{chats}", f"data.heldout={folder}/data/heldout{chats}"),
        *(f"data.tokenizer={folder}/data/tokenizer", f"data.sequence_length={length}", "stage.block_size=16"),
        *("train.global_batch_size=8", "train.micro_batch_size=2", f"train.tokens={NUM_STEPS * 8 * length}"),
        *("schedule.peak_lr=1e-3", "schedule.final_lr=1e-4", "evaluation.sequences=6", "evaluation.every_steps=5"),
        *(f"checkpoint.every_steps={RESUMED_AT}", "runtime.progress_bar=false", "runtime.tensorboard=false"),
    ]


def drafter_overrides(folder: Path, run_dir: Path, peak_lr: str = "schedule.peak_lr") -> list[str]:
    """Return the command of a drafter for the older export, on its chats. peak_lr: the key, which has been renamed."""
    return [
        *(f"checkpoint={folder}/export", f"data={folder}/data/train_chats.jsonl", f"output={run_dir}/adapter"),
        *(f"run.dir={run_dir}", "adapter.rank=4", "adapter.alpha=16", f"train.steps={DRAFTER_STEPS}"),
        *("train.global_batch_size=4", "train.micro_batch_size=1", "train.sequence_length=128"),
        *("train.blocks_per_sequence=4", f"{peak_lr}=1e-2", "checkpointing.every_steps=2", "zero.stage=0"),
        *("evaluation.every_steps=3", "evaluation.share=0.2", "runtime.dtype=fp32", "runtime.device=cpu"),
        *("runtime.progress_bar=false", "runtime.tensorboard=false"),
    ]


def _copy_as_of(run_dir: Path, step: int, copy: Path) -> None:
    """Copy the folder of a run as if it had ended after `step`."""
    shutil.copytree(run_dir, copy)
    for later in (copy / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    assert (copy / "checkpoints" / f"step_{step:08d}").exists()


def _losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in load_lines(run_dir, "train")]


@pytest.mark.parametrize("stage", ["joint", "sft"])
def test_a_run_goes_on_as_the_older_code_would_have(older: Older, tmp_path: Path, stage: str) -> None:
    _copy_as_of(older.folder / stage, RESUMED_AT, tmp_path / stage)
    _python(ROOT, "-m", "pretrain.train", *run_overrides(older.folder, stage, tmp_path / stage))
    expected = _losses(older.folder / stage)
    assert len(expected) == NUM_STEPS
    assert _losses(tmp_path / stage) == pytest.approx(expected, rel=1e-5)
    changes = sorted((tmp_path / stage / "starts").glob("*/changes.txt"))
    named = changes[-1].read_text(encoding="utf-8") if changes else ""
    assert "block_padding_loss" not in named and "completion_loss" not in named, "a renamed key is no changed setting"


def test_a_checkpoint_converts_to_the_same_weights(older: Older, tmp_path: Path) -> None:
    _python(ROOT, "-m", "model.convert", "--from", str(older.folder / "sft"), "--to", str(tmp_path / "export"))
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "export", older.folder / "export")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_export_decodes_with_its_own_code_as_with_ours(older: Older) -> None:
    from model.export.load import load_export

    prompt = torch.tensor([[5, 9, 14, 60, 61]])
    options = {"max_new_tokens": 24, "eos_token_id": 383}
    own: torch.nn.Module = AutoModel.from_pretrained(older.folder / "export", trust_remote_code=True)
    ours = load_export(older.folder / "export")
    for mode in ("ar_generate", "linear_spec_generate", "quadratic_spec_generate"):
        block = {} if mode == "ar_generate" else {"block_length": 8}
        theirs, _ = getattr(own, mode)(prompt, **options, **block)
        assert torch.equal(getattr(ours, mode)(prompt, **options, **block)[0], theirs), mode


def test_an_export_starts_another_stage(older: Older, tmp_path: Path) -> None:
    overrides = run_overrides(older.folder, "joint", tmp_path / "joint")
    _python(ROOT, "-m", "pretrain.train", *overrides, f"init_from={older.folder}/export", "train.tokens=1024")
    assert _losses(tmp_path / "joint")[0] < 5.5, "fresh weights begin at 5.95"


def test_a_drafter_goes_on_to_the_same_adapter(older: Older, tmp_path: Path) -> None:
    run_dir = tmp_path / "drafter"
    _copy_as_of(older.folder / "drafter", DRAFTER_RESUMED_AT, run_dir)
    shutil.rmtree(run_dir / "adapter")
    _python(ROOT, "-m", "lora.train", *drafter_overrides(older.folder, run_dir))
    ours, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run_dir, older.folder / "drafter")
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)

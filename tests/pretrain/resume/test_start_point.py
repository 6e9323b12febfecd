"""A run starts and continues only from what fits it: every mismatch is one message before anything is built."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from conf.composition.compose import compose_run_config
from conf.schema import GuardConfig, RunConfig
from conf.system.errors import UserError
from model.checkpoint.layout import save_checkpoint_manifest, step_directory
from model.convert.conversion import import_checkpoint
from model.convert.progress import Progress
from pretrain.health.guard import LossGuard
from pretrain.resume.start_point import StartPoint, build_manifest, find_start
from pretrain.run.run_data import open_data
from pretrain.run.run_status import TrainState
from tests.helpers.layouts import TP2
from tests.helpers.tiny_checkpoints import make_ministral3_vlm, save_tiny_tokenizer
from tests.helpers.toy_data import ToyData, make_toy_data, tokens_of


def compose(data: ToyData, root: Path, *extra: str) -> RunConfig:
    """Compose the run under test."""
    return compose_run_config(
        [*data.overrides(), "stage=joint", tokens_of(10), f"run.root={root}", "run.name=run", *extra]
    )


@pytest.fixture
def used_folder(toy_data: ToyData, tmp_path: Path) -> Path:
    """Make a run folder whose newest checkpoint (imported weights) claims step 5."""
    config = compose(toy_data, tmp_path)
    make_ministral3_vlm(tmp_path / "hf", model=config.model)
    import_checkpoint(tmp_path / "hf", Path(config.run.dir), config.data.mask_token, Progress())
    step = step_directory(config.run.dir, 0).rename(step_directory(config.run.dir, 5))
    manifest = build_manifest(
        config, open_data(config), StartPoint(11, export={"bos_token_id": 1}), TrainState(5, 5 * 512, 40), {}
    )
    save_checkpoint_manifest(step, manifest)
    return tmp_path


def start(config: RunConfig) -> Any:
    """Open the data and decide where the run starts."""
    return find_start(config, open_data(config))


def test_it_resumes_where_the_manifest_says(toy_data: ToyData, used_folder: Path) -> None:
    found = start(compose(toy_data, used_folder, *TP2, "schedule.peak_lr=5e-4"))
    assert found.state == TrainState(5, 5 * 512, 40)
    assert list(found.list_changes()) == [
        "parallel.tensor_parallel 1 -> 2",
        "schedule.peak_lr 0.001 -> 0.0005",
        "resume: the learning rate of the next step is 0.0005, it would have been 0.001",
    ]
    assert len(list(found.describe_changes())) == 3
    assert found.eos_token_id == 11
    assert found.export == {"bos_token_id": 1, "dlm_loss_weight": 0.3}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("resume=never", "resume=never"),
        ("model.num_layers=6", "num_layers"),
        ("model.rope.factor=0.25", "factor"),
        ("stage=ar", "init_from"),
        ("data.mask_token='<SPECIAL_99>'", "mask token 100"),
        ("data.sequence_length=128", "resume.allow_data_change=true"),
        ("train.seed=7", "resume.allow_data_change=true"),
    ],
)
def test_what_may_not_change_is_named(toy_data: ToyData, used_folder: Path, change: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        start(compose(toy_data, used_folder, change))


def test_changed_data_continues_only_when_allowed(toy_data: ToyData, used_folder: Path) -> None:
    other = dataclasses.replace(toy_data, train=toy_data.heldout)
    with pytest.raises(UserError, match="sources: "):
        start(compose(other, used_folder))
    assert start(compose(other, used_folder, "resume.allow_data_change=true")).state.step == 5


def test_another_tokenizer_is_refused(used_folder: Path, tmp_path: Path) -> None:
    other = make_toy_data(tmp_path / "other")
    save_tiny_tokenizer(other.tokenizer)
    # Without the manifest, only the checkpoint knows its tokenizer.
    train, heldout = (next(folder.glob("*.idx")).with_suffix("") for folder in (other.train, other.heldout))
    other = dataclasses.replace(other, train=train, heldout=heldout)
    with pytest.raises(UserError, match="tokenizer"):
        start(compose(other, used_folder))


def test_data_of_another_tokenizer_are_refused(toy_data: ToyData, tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path / "tokenizer")
    other = dataclasses.replace(toy_data, tokenizer=tmp_path / "tokenizer")
    with pytest.raises(UserError, match="prepare the data again"):
        open_data(compose(other, tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("data.train=nowhere/train", "nowhere/train"),
        ("data.tokenizer=nowhere", "nowhere"),
        ("data.mask_token=MASK", "mask token"),
        ("model.vocab_size=200", "vocab_size"),
        ("data.sequence_length=64000000", "fewer than one sequence"),
        ("init_from=nowhere", "nowhere"),
    ],
)
def test_bad_input_is_named(toy_data: ToyData, tmp_path: Path, change: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        start(compose(toy_data, tmp_path, change))


def test_a_checkpoint_with_keys_of_earlier_versions_resumes_as_the_same_settings(
    toy_data: ToyData, used_folder: Path
) -> None:
    """checkpoint.json as the code of November 2026 wrote it, before keys of the configuration were renamed."""
    path = used_folder / "run" / "checkpoints" / "step_00000005" / "checkpoint.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    data, runtime = manifest["config"]["data"], manifest["config"]["runtime"]
    data["completion_loss"] = data.pop("block_padding_loss")
    runtime["attention_backend"] = "split"
    manifest["guard"] = {"losses": [4.0, 4.5], "nonfinite": 1, "spikes": 2}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    found = start(compose(toy_data, used_folder, "runtime.attention_backend=cpu"))
    assert list(found.list_changes()) == []
    guard = LossGuard(GuardConfig())
    guard.restore(found.guard)
    assert (list(guard.losses), guard.nonfinite, guard.spikes) == ([4.0, 4.5], 1, 2)

"""Weights and the optimizer's fp32 copies agree in a checkpoint, whichever rank held them."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from conf.composition.compose import load_run_config
from pretrain.costs import compute_checkpoint_bytes
from tests.distributed.test_layouts import assert_same_curve
from tests.helpers.processes import train_many
from tests.helpers.toy_data import ToyData, tokens_of

OVERLAPPED = ["parallel=single", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
COPY = "optimizer.state.param."


def load_tensors(step_dir: Path) -> dict[str, torch.Tensor]:
    """Load all tensors of a step directory through torch's own reader."""
    reader = FileSystemReader(step_dir)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in stored.items()
        if isinstance(item, TensorStorageMetadata)
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@pytest.fixture(scope="module")
def root(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two data-parallel ranks that save between steps, without an evaluation that would gather weights."""
    root = tmp_path_factory.mktemp("runs")
    shared = [*toy_data.overrides(), "stage=joint", f"run.root={root}", tokens_of(6), "checkpoint.every_steps=3"]
    shared += ["data.heldout=null"]
    jobs = [
        [*shared, "run.name=plain", "parallel=single"],
        [*shared, "run.name=overlapped", *OVERLAPPED],
        [*shared, "run.name=overlapped_bf16", *OVERLAPPED, "precision=bf16"],
    ]
    train_many(2, jobs, root)
    return root


@pytest.mark.parametrize("run", ["plain", "overlapped", "overlapped_bf16"])
@pytest.mark.parametrize("step", ["step_00000003", "step_00000006"])
def test_saved_weights_are_the_optimizers_after_the_step(root: Path, run: str, step: str) -> None:
    tensors = load_tensors(root / run / "checkpoints" / step)
    names = [key.removeprefix(COPY) for key in tensors if key.startswith(COPY)]
    assert len(names) == 4 * 6 + 3
    for name in names:
        assert torch.equal(tensors[name], tensors[COPY + name].to(tensors[name].dtype)), name


def test_saving_does_not_change_what_overlapped_training_computes(root: Path) -> None:
    assert_same_curve(root / "plain", root / "overlapped", kinds=("train",))


@pytest.mark.parametrize("run", ["plain", "overlapped_bf16"])
def test_a_checkpoint_is_as_large_as_its_configuration_says(root: Path, run: str) -> None:
    config = load_run_config(root / run / "config.yaml")
    on_disk = sum(path.stat().st_size for path in (root / run / "checkpoints" / "step_00000006").iterdir())
    # At this size what is no tensor weighs the most.
    assert compute_checkpoint_bytes(config.model, config.precision.dtype) == pytest.approx(on_disk, rel=0.02)

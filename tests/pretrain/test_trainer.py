"""How much of this repository one joint training step enters, and how often it wraps a batch."""

from pathlib import Path

import pytest
import torch

from conf.composition.compose import compose_run_config
from model.attention import rotation
from pretrain.run.metrics import load_metrics
from pretrain.run.run_status import RunPhase, load_status
from pretrain.step.rehearsal import rehearse
from tests.helpers.toy_data import ToyData, tokens_of
from tests.trace_step import Trace, list_forms, trace_joint_step, with_trainer

# With the files of status.json, which a step writes only if the last time is some seconds ago.
MAX_FILES, MAX_FILES_OF_PRETRAIN, MAX_WRAPPERS = 42, 17, 9
# Where the dataclasses live that hold a batch between the data files and the loss.
WRAPPERS = ("data_pipeline.", "pretrain.step.", "model.attention.plan.", "model.megatron.")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trace")


@pytest.fixture(scope="module")
def trace(directory: Path) -> Trace:
    return trace_joint_step(directory)


def test_a_joint_step_enters_few_files(trace: Trace) -> None:
    """Whoever reads the step has to open them all."""
    assert len(trace.files) <= MAX_FILES, "\n".join(sorted(trace.files))
    of_pretrain = sorted(file for file in trace.files if Path(file).is_relative_to("pretrain"))
    assert len(of_pretrain) <= MAX_FILES_OF_PRETRAIN, "\n".join(of_pretrain)
    assert "pretrain/trainer.py" in of_pretrain, "the step was traced"


def test_a_batch_is_wrapped_few_times_between_file_and_loss(trace: Trace) -> None:
    wrappers = sorted(name for name in trace.dataclasses if name.startswith(WRAPPERS))
    assert 0 < len(wrappers) <= MAX_WRAPPERS, "\n".join(wrappers)
    assert {name.rpartition(".")[2] for name in wrappers} == set(list_forms()), "data_pipeline/batch.py names them"


def test_a_step_on_a_cpu_compiles_nothing(trace: Trace, directory: Path) -> None:
    assert [line["compiled_kernels"] for line in load_metrics(directory / "trace", "train")] == [0, 0]
    assert not (directory / "trace" / "kernels").exists()


def test_what_a_step_compiles_is_in_metrics_and_status(toy_data: ToyData, tmp_path: Path, monkeypatch) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rotation.rotate_heads, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(rotation, "rotate_heads", compiled)
    config = compose_run_config([*toy_data.overrides(), "stage=ar", tokens_of(2), f"run.root={tmp_path}", "run.name=r"])

    def train(trainer) -> None:
        for _ in range(2):
            trainer.train_step()
        trainer.report.write_phase(RunPhase.running, trainer.state)

    with_trainer(config, train)
    first, second = [line["compiled_kernels"] for line in load_metrics(tmp_path / "r", "train")]
    assert first == second >= 4  # queries and keys, forward and backward
    status = load_status(tmp_path / "r")
    assert status is not None and status.kernels.compiled_kernels == first and status.kernels.recompiled_kernels == 0
    log = (tmp_path / "r" / "train.log").read_text()
    assert log.count(f"step 1: compiled {first} kernels in ") == 1 and f"(rotate_heads {first})" in log


def test_rehearsing_every_length_changes_no_step(toy_data: ToyData, tmp_path: Path) -> None:
    overrides = [*toy_data.overrides(), "stage=joint", tokens_of(2), f"run.root={tmp_path}"]

    def train(trainer) -> None:
        trainer.train_step()
        trainer.train_step()

    def rehearse_and_train(trainer) -> None:
        rehearse(trainer.model, trainer.builder, trainer.loader.microbatches(0)[0])
        train(trainer)

    for name, use in (("plain", train), ("rehearsed", rehearse_and_train)):
        with_trainer(compose_run_config([*overrides, f"run.name={name}"]), use)
    plain, rehearsed = (load_metrics(tmp_path / name, "train") for name in ("plain", "rehearsed"))
    same = ("loss", "grad_norm", "ar_loss", "diffusion_loss")
    assert [[line[key] for key in same] for line in plain] == [[line[key] for key in same] for line in rehearsed]
    assert len(plain) == 2
    assert "forwards with 8 noisy lengths rehearsed in " in (tmp_path / "rehearsed" / "train.log").read_text()

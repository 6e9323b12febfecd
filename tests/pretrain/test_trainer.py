"""How much of this repository one joint training step enters, and how often it wraps a batch."""

from pathlib import Path

import pytest

from tests.trace_step import Trace, list_forms, trace_joint_step

MAX_FILES, MAX_FILES_OF_PRETRAIN, MAX_WRAPPERS = 32, 13, 8
# Where the dataclasses live that hold a batch between the data files and the loss.
WRAPPERS = ("data_pipeline.", "pretrain.step.", "model.attention.plan.", "model.megatron.")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return trace_joint_step(tmp_path_factory.mktemp("trace"))


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

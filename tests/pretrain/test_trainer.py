"""How much of this repository one joint training step enters."""

from pathlib import Path

import pytest

from tests.trace_step import Trace, trace_joint_step

MAX_FILES, MAX_FILES_OF_PRETRAIN = 32, 13


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return trace_joint_step(tmp_path_factory.mktemp("trace"))


def test_a_joint_step_enters_few_files(trace: Trace) -> None:
    """Whoever reads the step has to open them all."""
    assert len(trace.files) <= MAX_FILES, "\n".join(sorted(trace.files))
    of_pretrain = sorted(file for file in trace.files if Path(file).is_relative_to("pretrain"))
    assert len(of_pretrain) <= MAX_FILES_OF_PRETRAIN, "\n".join(of_pretrain)
    assert "pretrain/trainer.py" in of_pretrain, "the step was traced"

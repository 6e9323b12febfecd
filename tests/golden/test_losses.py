"""Losses of short runs stay those that were written down."""

import pytest

from tests.golden.record import STAGES, load_golden, record_losses

# Processors and thread counts sum in other orders; a changed rule moves a loss by far more.
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return record_losses(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_the_recorded_ones(losses: dict[str, list[float]], stage: str) -> None:
    assert losses[stage] == pytest.approx(load_golden(stage), rel=RELATIVE)
    assert len(losses[stage]) > 3

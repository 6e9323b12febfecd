"""Fixtures for everyone: a small tokenised corpus of real text."""

from pathlib import Path

import pytest

from tests.helpers.toy_data import ToyData, make_toy_data


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    """Prepare a tokenizer, training and held-out data from a few standard library sources."""
    directory: Path = tmp_path_factory.mktemp("toy_data")
    return make_toy_data(directory)

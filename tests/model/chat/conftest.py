"""A tiny random chat model, exported: weights, tokenizer and the ChatML template."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.tiny_exports import save_random_adapter, save_tiny_export


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an export that all tests share; tests that change files take `copy_export`."""
    return save_tiny_export(tmp_path_factory.mktemp("chat") / "export")


@pytest.fixture
def copy_export(export: Path, tmp_path: Path) -> Path:
    """Copy the export for a test that damages it."""
    return Path(shutil.copytree(export, tmp_path / "export"))


@pytest.fixture
def add_adapter() -> Callable[..., Path]:
    """Return a function that saves a random draft adapter into an export and returns its folder."""

    def add(export: Path, targets: tuple[str, ...] = ("o_proj",)) -> Path:
        return save_random_adapter(export / "linear_spec_lora", targets=targets)

    return add

"""The code that travels with exports is all that they need, and nothing else."""

from pathlib import Path

import pytest

from model.export.shipped_code import (
    CODE_FOLDER,
    CONFIGURATION_MODULE,
    MODELING_MODULE,
    NLD_TYPE,
    defines_class,
    find_indirect_files,
    find_needed_files,
    list_code_files,
)
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig

FIRST = (f"{CONFIGURATION_MODULE}.py", f"{MODELING_MODULE}.py")


def test_every_shipped_file_is_needed_and_every_needed_file_is_shipped() -> None:
    there, missing = find_needed_files(CODE_FOLDER, FIRST)
    assert there == {path.name for path in list_code_files()}
    assert not missing


@pytest.mark.parametrize("file", FIRST)
def test_a_file_in_auto_map_imports_itself_whatever_it_needs(file: str) -> None:
    """Older versions of transformers copy nothing else (slow: tests/model/hf/versions)."""
    assert find_indirect_files(CODE_FOLDER, file) == []


def test_whoever_trusts_the_shipped_code_has_few_short_files_to_read() -> None:
    files = list_code_files()
    assert len(files) <= 13
    assert max(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 300


def test_the_model_type_is_that_of_the_shipped_configuration() -> None:
    assert NemotronLabsDiffusionConfig.model_type == NLD_TYPE


def test_imports_are_followed_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from . import b\nimport torch\n\ndef late():\n    from .c import d\n")
    (tmp_path / "b.py").write_text("from .a import late\nclass Here:\n    class Inner: ...\n")
    assert find_needed_files(tmp_path, ["a.py"]) == ({"a.py", "b.py"}, {"c.py"})
    assert defines_class(tmp_path / "b.py", "Here") and not defines_class(tmp_path / "b.py", "Inner")
    (tmp_path / "c.py").write_text("import (")
    with pytest.raises(SyntaxError):
        find_needed_files(tmp_path, ["a.py"])

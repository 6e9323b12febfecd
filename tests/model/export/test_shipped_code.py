"""The code that travels with exports is all that they need, and nothing else."""

from pathlib import Path

import pytest

from model.export.shipped_code import (
    CODE_FOLDER,
    NLD_TYPE,
    VLM_TYPE,
    defines_class,
    find_indirect_files,
    find_needed_files,
    list_code_files,
    list_first_files,
)
from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
from model.hf.configuration_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMConfig

MOST_FILES = {NLD_TYPE: 13, VLM_TYPE: 19}  # the text model's, and those about images


def list_names(model_type: str) -> set[str]:
    return {path.name for path in list_code_files(model_type)}


def test_every_file_of_the_folder_is_shipped_with_a_variant() -> None:
    there = {path.name for path in CODE_FOLDER.glob("*.py")} - {"__init__.py"}
    assert list_names(NLD_TYPE) | list_names(VLM_TYPE) == there


def test_a_text_model_ships_nothing_about_images_and_the_other_all_of_the_text_model() -> None:
    more = list_names(VLM_TYPE) - list_names(NLD_TYPE)
    assert list_names(NLD_TYPE) < list_names(VLM_TYPE)
    assert more == {"image_loading.py", "image_tokens.py", *list_first_files(VLM_TYPE)}


@pytest.mark.parametrize("file", [*list_first_files(NLD_TYPE), *list_first_files(VLM_TYPE)])
def test_a_file_in_auto_map_imports_itself_whatever_it_needs(file: str) -> None:
    """Older versions of transformers copy nothing else (slow: tests/model/hf/versions)."""
    assert find_indirect_files(CODE_FOLDER, file) == []


@pytest.mark.parametrize("model_type", MOST_FILES)
def test_whoever_trusts_the_shipped_code_has_few_short_files_to_read(model_type: str) -> None:
    files = list_code_files(model_type)
    assert len(files) <= MOST_FILES[model_type]
    assert max(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 300


def test_the_model_type_is_that_of_the_shipped_configuration() -> None:
    assert NemotronLabsDiffusionConfig.model_type == NLD_TYPE
    assert NemotronLabsDiffusionVLMConfig.model_type == VLM_TYPE


def test_imports_are_followed_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from . import b\nimport torch\n\ndef late():\n    from .c import d\n")
    (tmp_path / "b.py").write_text("from .a import late\nclass Here:\n    class Inner: ...\n")
    assert find_needed_files(tmp_path, ["a.py"]) == ({"a.py", "b.py"}, {"c.py"})
    assert defines_class(tmp_path / "b.py", "Here") and not defines_class(tmp_path / "b.py", "Inner")
    (tmp_path / "c.py").write_text("import (")
    with pytest.raises(SyntaxError):
        find_needed_files(tmp_path, ["a.py"])

"""The Python files shipped with every export: which they are, and which files of a folder a Python file needs.

Standard library only. Code is read as text here, never executed.
"""

import ast
from collections.abc import Iterable
from pathlib import Path

CONFIG_NAME = "config.json"
VERSION_KEY = "transformers_version"  # of config.json: which one wrote it
GENERATION_CONFIG_NAME = "generation_config.json"
# model_type in config.json: of the text model, and of the one that reads images
NLD_TYPE, VLM_TYPE = "nemotron_labs_diffusion", "nemotron_labs_diffusion_vlm"
# Of config.json: what exports have, and what older ones of the same weights have; loading goes by auto_map.
ARCHITECTURE, OLDER_ARCHITECTURE = "NemotronLabsDiffusionModel", "NemotronLabsDiffusionEncoderModel"
CODE_FOLDER = Path(__file__).parents[1] / "hf"
# The files that auto_map names, in config.json and in the processors' files; they import the others.
CONFIGURATION_MODULE, MODELING_MODULE = f"configuration_{NLD_TYPE}", f"modeling_{NLD_TYPE}"
FIRST_FILES = {
    NLD_TYPE: (f"{CONFIGURATION_MODULE}.py", f"{MODELING_MODULE}.py"),
    VLM_TYPE: tuple(
        f"{part}_{VLM_TYPE}.py" for part in ("configuration", "modeling", "image_processing", "processing")
    ),
}


def list_code_files(model_type: str = NLD_TYPE) -> list[Path]:
    """List the files of model/hf that go into an export of a model_type, sorted."""
    found, missing = find_needed_files(CODE_FOLDER, FIRST_FILES[model_type])
    assert not missing, f"{CODE_FOLDER} lacks {missing}"
    return sorted(CODE_FOLDER / name for name in found)


def find_needed_files(folder: Path, first: Iterable[str]) -> tuple[set[str], set[str]]:
    """Follow imports within a folder from the files `first`; return the names (found, missing).

    Raises:
        SyntaxError: a file is not Python (ValueError if it contains a NUL byte).
    """
    found, missing, waiting = set[str](), set[str](), list(first)
    while waiting:
        name = waiting.pop()
        if name in found | missing:
            continue
        if not (folder / name).is_file():
            missing.add(name)
            continue
        found.add(name)
        waiting += [f"{module}.py" for module in _find_relative_imports(folder / name)]
    return found, missing


def find_indirect_files(folder: Path, first: str) -> list[str]:
    """List the files that `first` needs but does not import itself, sorted. Raises: as find_needed_files.

    Before version 5.11 transformers copies from a local folder only what the file named in auto_map imports itself.
    """
    direct = {f"{module}.py" for module in _find_relative_imports(folder / first)}
    return sorted(find_needed_files(folder, [first])[0] - direct - {first})


def defines_class(path: Path, name: str) -> bool:
    """Return whether the file defines class `name` at its top level. Raises: as find_needed_files."""
    tree = _parse(path)
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


def _find_relative_imports(path: Path) -> list[str]:
    """Return the modules of `from .module import name` and `from . import module` anywhere in a file."""
    tree = _parse(path)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    named = [node.module for node in nodes if node.module]
    return named + [alias.name for node in nodes if not node.module for alias in node.names]


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=path.name)
    except (RecursionError, MemoryError):  # which of the two depends on what is nested
        raise SyntaxError("nested too deep", (path.name, None, None, None)) from None

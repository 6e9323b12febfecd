"""The Python files shipped with every export: which they are, and which files of a folder a Python file needs.

Standard library only. Code is read as text here, never executed.
"""

import ast
from collections.abc import Iterable
from pathlib import Path

CONFIG_NAME = "config.json"
VERSION_KEY = "transformers_version"  # of config.json: which one wrote it
GENERATION_CONFIG_NAME = "generation_config.json"
NLD_TYPE = "nemotron_labs_diffusion"  # model_type in config.json
# Of config.json: what exports have, and what older ones of the same weights have; loading goes by auto_map.
ARCHITECTURE, OLDER_ARCHITECTURE = "NemotronLabsDiffusionModel", "NemotronLabsDiffusionEncoderModel"
CODE_FOLDER = Path(__file__).parents[1] / "hf"
# The files that auto_map in config.json names; they import the others.
CONFIGURATION_MODULE, MODELING_MODULE = f"configuration_{NLD_TYPE}", f"modeling_{NLD_TYPE}"


def list_code_files() -> list[Path]:
    """List the files of model/hf that go into an export, sorted."""
    return sorted(path for path in CODE_FOLDER.glob("*.py") if path.name != "__init__.py")


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

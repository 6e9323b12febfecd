"""The Python files that travel with every export: the one list of them, and what Python files import from siblings.

Standard library only. Code is read as text here, never executed.
"""

import ast
from collections.abc import Iterable
from pathlib import Path

CODE_FOLDER = Path(__file__).parents[1] / "hf"
CODE_PATTERN = "*_nemotron_labs_diffusion.py"


def list_code_files() -> list[Path]:
    """The files of model/hf that an export gets, sorted."""
    return sorted(CODE_FOLDER.glob(CODE_PATTERN))


def find_needed_files(folder: Path, first: Iterable[str]) -> tuple[set[str], set[str]]:
    """(there, missing): names of `first` and of all that they import from their own folder, one after the other.

    Raises: SyntaxError (ValueError for a NUL byte) if a file is no Python.
    """
    there, missing, waiting = set[str](), set[str](), list(first)
    while waiting:
        name = waiting.pop()
        if name in there | missing:
            continue
        if not (folder / name).is_file():
            missing.add(name)
            continue
        there.add(name)
        waiting += [f"{module}.py" for module in _find_relative_imports(folder / name)]
    return there, missing


def defines_class(path: Path, name: str) -> bool:
    """Whether the file defines class `name` at its top level. Raises: as find_needed_files."""
    tree = _parse(path)
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


def _find_relative_imports(path: Path) -> list[str]:
    """Modules of `from .module import name` and `from . import module`, wherever they stand."""
    tree = _parse(path)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    named = [node.module for node in nodes if node.module]
    return named + [alias.name for node in nodes if not node.module for alias in node.names]


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=path.name)
    except (RecursionError, MemoryError):  # which of them depends on what is nested
        raise SyntaxError("nested too deep", (path.name, None, None, None)) from None

"""The Python files shipped with every export: which they are, and which files of a folder a Python file needs.

Standard library only. Code is read as text here, never executed.
"""

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
VERSION_KEY = "transformers_version"  # of config.json: which one wrote it
GENERATION_CONFIG_NAME = "generation_config.json"
# model_type in config.json: of the text model, and of the one that reads images
NLD_TYPE, VLM_TYPE = "nemotron_labs_diffusion", "nemotron_labs_diffusion_vlm"
# Of config.json: what exports have, and what older ones of the same weights have; loading goes by auto_map.
CLASS_PREFIXES = {NLD_TYPE: "NemotronLabsDiffusion", VLM_TYPE: "NemotronLabsDiffusionVLM"}
ARCHITECTURES = {model_type: f"{prefix}Model" for model_type, prefix in CLASS_PREFIXES.items()}
OLDER_ARCHITECTURE = "NemotronLabsDiffusionEncoderModel"
CODE_FOLDER = Path(__file__).parents[1] / "hf"


def build_auto_map(model_type: str) -> dict[str, str]:
    """Return what config.json says of its classes, as file and name."""
    prefix = CLASS_PREFIXES[model_type]
    return {
        "AutoConfig": f"configuration_{model_type}.{prefix}Config",
        "AutoModel": f"modeling_{model_type}.{prefix}Model",
    }


def find_model_type(config: dict[str, Any]) -> str | None:
    """Return the model_type of an export whose config.json names the classes that this project ships, else None."""
    model_type = config.get("model_type")
    is_ours = model_type in CLASS_PREFIXES and config.get("auto_map") == build_auto_map(str(model_type))
    return model_type if is_ours else None


PROCESSOR_CONFIG_NAME = "processor_config.json"
# What the file of the processors, of exports with images alone, says of their classes.
PROCESSOR_MAP = {"AutoProcessor": f"processing_{VLM_TYPE}.{CLASS_PREFIXES[VLM_TYPE]}Processor"}
IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": f"image_processing_{VLM_TYPE}.{CLASS_PREFIXES[VLM_TYPE]}ImageProcessor"}


def list_first_files(model_type: str) -> list[str]:
    """List the files that auto_map names, in config.json and in the processors' file; they import the others."""
    maps = [build_auto_map(model_type), *([PROCESSOR_MAP, IMAGE_PROCESSOR_MAP] if model_type == VLM_TYPE else [])]
    return [f"{target.partition('.')[0]}.py" for targets in maps for target in targets.values()]


def list_code_files(model_type: str = NLD_TYPE) -> list[Path]:
    """List the files of model/hf that go into an export of a model_type, sorted."""
    found, missing = find_needed_files(CODE_FOLDER, list_first_files(model_type))
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

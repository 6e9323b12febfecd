"""The Python files of an export: whether loading finds all of them, and whose they are. Nothing is executed."""

from pathlib import Path
from typing import Any

from model.checkpoint.checksums import hash_file
from model.convert.safetensors_reader import some
from model.export.shipped_code import defines_class, find_needed_files, list_code_files
from model.verify_export.check import Check, failed, passed, warned

COMPLETE = "code is complete"
REQUIRED_CLASSES = ("AutoConfig", "AutoModel")
CUSTOM_GENERATE = "custom_generate/generate.py"  # transformers puts it in the place of the model's own generate


def check_auto_map(directory: Path, config: dict[str, Any]) -> Check:
    """Whether loading runs classes in files of the directory that find all they import from it, and nothing else."""
    if (directory / CUSTOM_GENERATE).exists():
        return failed(COMPLETE, f"{CUSTOM_GENERATE} would run on loading and replace generate()", "remove it")
    try:
        targets = _read_targets(config.get("auto_map"))
        files = [f"{module}.py" for module, _ in targets.values()]
        needed, missing = find_needed_files(directory, files)
        undefined = [
            f"{module}.{name}"
            for module, name in targets.values()
            if f"{module}.py" in needed and not defines_class(directory / f"{module}.py", name)
        ]
    except SyntaxError as error:
        return failed(COMPLETE, f"{error.filename} is no Python: {error.msg}", "export or fetch it again")
    except ValueError as error:
        return failed(COMPLETE, str(error), "copy auto_map from an export of python -m model.convert")
    if missing:
        return failed(
            COMPLETE, f"missing, though auto_map needs it: {some(sorted(missing))}", "fetch or export it again"
        )
    if undefined:
        return failed(COMPLETE, f"auto_map names classes that are not there: {some(undefined)}", "fetch it again")
    return passed(COMPLETE, f"auto_map needs {len(needed)} files of this folder, all there")


def _read_targets(auto_map: Any) -> dict[str, tuple[str, str]]:
    """AutoConfig and so on -> (module, class). Raises: ValueError."""
    if not isinstance(auto_map, dict) or any(key not in auto_map for key in REQUIRED_CLASSES):
        raise ValueError(f"config.json has no auto_map with {' and '.join(REQUIRED_CLASSES)}")
    targets = {}
    for key, value in auto_map.items():
        module, _, name = value.rpartition(".") if isinstance(value, str) else ("", "", "")
        if "--" in str(value):
            raise ValueError(f"auto_map takes {key} from elsewhere ({value}): code outside of this folder would run")
        if not (module.isidentifier() and name.isidentifier()):
            raise ValueError(f"auto_map gives {key} as {value!r}, not as module.Class")
        targets[key] = (module, name)
    return targets


def check_origin(directory: Path, names: list[str]) -> Check:
    """Whether every Python file is to the letter one that this project ships."""
    name = "code is known"
    shipped = {path.name: path for path in list_code_files()}
    code = [file for file in names if file.endswith(".py")]
    foreign = [file for file in code if file not in shipped]
    changed = [file for file in code if file in shipped and not _is_same(directory / file, shipped[file])]
    if not (foreign or changed):
        return passed(name, f"{len(code)} files, all as this version of the project ships them")
    groups = (("changed", changed), ("foreign", foreign))
    found = [f"{what}: {some(files, 12)}" for what, files in groups if files]
    detail = "; ".join([f"{len(code) - len(changed) - len(foreign)} known", *found])
    return warned(name, detail, "read it before you load with trust_remote_code; this project's commands never run it")


def _is_same(path: Path, shipped: Path) -> bool:
    return hash_file(path) == hash_file(shipped)


def check_tokenizer_code(config: dict[str, Any]) -> Check | None:
    """A warning if the tokenizer brings code of its own; tokenizer_config.json's content."""
    if "auto_map" not in config:
        return None
    detail = f"tokenizer_config.json has an auto_map: {config['auto_map']}"
    return warned("tokenizer code", detail, "the format needs none: read it before you load with trust_remote_code")

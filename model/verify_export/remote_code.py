"""Checks the Python files of an export: whether loading finds all of them, and whose they are. Executes nothing."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.checkpoint.checksums import hash_file
from model.convert.hf_target import TOKENIZER_CONFIG_NAME, build_portable_tokenizer_config
from model.convert.safetensors_reader import some
from model.export.shipped_code import (
    CLASS_PREFIXES,
    CONFIG_NAME,
    PROCESSOR_CONFIG_NAME,
    VERSION_KEY,
    VLM_TYPE,
    defines_class,
    find_indirect_files,
    find_model_type,
    find_needed_files,
    list_code_files,
)
from model.hf.configuration_nemotron_labs_diffusion import OLDEST_VERSIONS
from model.verify_export.check import ExportCheck
from model.verify_export.configuration import read_if_there

COMPLETE = "code is complete"
REQUIRED_CLASSES = ("AutoConfig", "AutoModel")
OLDEST_TRANSFORMERS = OLDEST_VERSIONS["transformers"]
CUSTOM_GENERATE = "custom_generate/generate.py"  # transformers would replace the model's own generate with it


def check_auto_map(directory: Path, config: dict[str, Any]) -> ExportCheck:
    """Check that auto_map names classes in files of the directory, and that all files they import are there."""
    if (directory / CUSTOM_GENERATE).exists():
        return ExportCheck.failed(
            COMPLETE, f"{CUSTOM_GENERATE} would run on loading and replace generate()", "remove it"
        )
    try:
        targets = _read_targets(config.get("auto_map")) | _read_processor_targets(directory)
        files = [f"{module}.py" for module, _ in targets.values()]
        needed, missing = find_needed_files(directory, files)
        undefined = [
            f"{module}.{name}"
            for module, name in targets.values()
            if f"{module}.py" in needed and not defines_class(directory / f"{module}.py", name)
        ]
    except SyntaxError as error:
        return ExportCheck.failed(COMPLETE, f"{error.filename} is not Python: {error.msg}", "export or fetch it again")
    except ValueError as error:
        return ExportCheck.failed(COMPLETE, str(error), "copy auto_map from an export of python -m model.convert")
    if missing:
        return ExportCheck.failed(
            COMPLETE, f"missing, though auto_map needs it: {some(sorted(missing))}", "fetch or export it again"
        )
    if undefined:
        return ExportCheck.failed(
            COMPLETE, f"auto_map names classes that are not there: {some(undefined)}", "fetch it again"
        )
    return ExportCheck.passed(COMPLETE, f"auto_map needs {len(needed)} files of this folder, all there")


def _read_processor_targets(directory: Path) -> dict[str, tuple[str, str]]:
    """Read the auto_maps of processor_config.json, {} where there is none. Raises: ValueError."""
    processor = read_if_there(directory / PROCESSOR_CONFIG_NAME)
    parts = [part for part in (processor, processor.get("image_processor")) if isinstance(part, dict)]
    maps = [part["auto_map"] for part in parts if isinstance(part.get("auto_map"), dict)]
    return _parse_targets({key: value for auto_map in maps for key, value in auto_map.items()})


def _read_targets(auto_map: Any) -> dict[str, tuple[str, str]]:
    """Read auto_map as AutoConfig and so on -> (module, class). Raises: ValueError."""
    if not isinstance(auto_map, dict) or any(key not in auto_map for key in REQUIRED_CLASSES):
        raise ValueError(f"config.json has no auto_map with {' and '.join(REQUIRED_CLASSES)}")
    return _parse_targets(auto_map)


def _parse_targets(auto_map: dict[str, Any]) -> dict[str, tuple[str, str]]:
    targets = {}
    for key, value in auto_map.items():
        module, _, name = value.rpartition(".") if isinstance(value, str) else ("", "", "")
        if "--" in str(value):
            raise ValueError(f"auto_map takes {key} from elsewhere ({value}): code outside of this folder would run")
        if not (module.isidentifier() and name.isidentifier()):
            raise ValueError(f"auto_map gives {key} as {value!r}, not as module.Class")
        targets[key] = (module, name)
    return targets


def check_versions(directory: Path, config: dict[str, Any], tokenizer_config: dict[str, Any]) -> ExportCheck:
    """Say which versions of transformers load this folder, as far as its code and its tokenizer's names decide that."""
    name = "transformers"
    try:
        files = {f"{module}.py" for module, _ in _read_targets(config.get("auto_map")).values()}
        indirect = sorted({needed for file in files for needed in find_indirect_files(directory, file)})
    except (SyntaxError, ValueError, FileNotFoundError):
        return ExportCheck.skipped(name, "the code cannot be read")
    limits = list(_find_tokenizer_limits(tokenizer_config))
    if indirect:
        limits.append(f"the files in auto_map do not import {some(indirect)} themselves, which needs 5.11")
    if config.get(VERSION_KEY) is None:
        limits.append(f"{CONFIG_NAME} has no {VERSION_KEY}, which 4.57.3 to 5.0 take for a broken tokenizer")
    if not limits and config.get("model_type") == VLM_TYPE:
        return ExportCheck.passed(name, "loads from this folder; models with images were tried in 5.23 alone")
    if not limits:
        return ExportCheck.passed(name, f"loads from this folder in {OLDEST_TRANSFORMERS} and newer")
    detail = f"does not load, or not alike, in every version from {OLDEST_TRANSFORMERS} on: {'; '.join(limits)}"
    refresh = f"python -m model.convert --refresh {shlex.quote(str(directory))}"
    return ExportCheck.warned(name, detail, refresh if find_model_type(config) else "ask who made it")


def _find_tokenizer_limits(config: dict[str, Any]) -> Iterator[str]:
    portable = build_portable_tokenizer_config(config)
    if (given := config.get("tokenizer_class")) != portable["tokenizer_class"]:
        yield f"{TOKENIZER_CONFIG_NAME} names the class {given}, not {portable['tokenizer_class']}"
    if "extra_special_tokens" in config.keys() - portable.keys():
        yield f"{TOKENIZER_CONFIG_NAME} lists extra_special_tokens, where 4.57 expects names"


def check_origin(directory: Path, names: list[str]) -> ExportCheck:
    """Check that every Python file equals one that this project ships."""
    name = "code is known"
    shipped = {path.name: path for model_type in CLASS_PREFIXES for path in list_code_files(model_type)}
    code = [file for file in names if file.endswith(".py")]
    foreign = [file for file in code if file not in shipped]
    changed = [file for file in code if file in shipped and not _is_same(directory / file, shipped[file])]
    if not (foreign or changed):
        return ExportCheck.passed(name, f"{len(code)} files, all as this version of the project ships them")
    groups = (("changed", changed), ("foreign", foreign))
    found = [f"{what}: {some(files, 12)}" for what, files in groups if files]
    detail = "; ".join([f"{len(code) - len(changed) - len(foreign)} known", *found])
    return ExportCheck.warned(
        name, detail, "read it before you load with trust_remote_code; this project's commands never run it"
    )


def _is_same(path: Path, shipped: Path) -> bool:
    return hash_file(path) == hash_file(shipped)


def check_tokenizer_code(config: dict[str, Any]) -> ExportCheck | None:
    """Warn if the tokenizer brings its own code. config: content of tokenizer_config.json."""
    if "auto_map" not in config:
        return None
    detail = f"tokenizer_config.json has an auto_map: {config['auto_map']}"
    return ExportCheck.warned(
        "tokenizer code", detail, "the format needs none: read it before you load with trust_remote_code"
    )

"""One clear message for everything that can be wrong with an override: what, where, and the nearest valid spelling."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from conf.errors import ConfigError
from conf.schema import RunConfig
from conf.sources import ANY_NAME, to_schema_key

CONF_DIR = Path(__file__).parent


def explain(error: Exception) -> ConfigError:
    """Turn what Hydra or OmegaConf raised into a ConfigError with one message for the user."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_option(error.missing_cfg_file, list(error.options or []))
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"cannot read the override {error.override!r}: {_first_line(error)}. "
            "Write key=value, with quotes inside quotes where the value has special characters: 'key=\"a=b\"'"
        )
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return ConfigError(
            f"{mark.name}, line {mark.line + 1}, column {mark.column + 1} is not YAML: {error.problem}; quote ??? and "
            "${...} inside braces"
        )
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown and to_schema_key(unknown.group(1)) not in valid_keys():
        return explain_unknown_keys([unknown.group(1)])
    detail = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(detail, "full_key", None)
    if key:
        return ConfigError(f"{key}: {_first_line(detail)}")
    return ConfigError(f"cannot compose the overrides (group=option or key=value): {' '.join(str(error).split())}")


def explain_unknown_keys(keys: Iterable[str]) -> ConfigError:
    """Name each unknown key and the valid key nearest to it."""
    return ConfigError("; ".join(_describe_unknown(key) for key in keys))


def valid_keys() -> list[str]:
    """Every dotted key a user may set, in schema order."""
    return list(_schema_keys(RunConfig))


def group_options(group: str) -> list[str]:
    """Names of the YAML files of one config group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def groups() -> list[str]:
    """Names of the config groups: the folders of conf/ that hold YAML files."""
    return sorted({path.parent.name for path in CONF_DIR.glob("*/*.yaml")})


def _describe_unknown(key: str) -> str:
    parent = to_schema_key(key).rpartition(".")[0]
    siblings = [name for name in valid_keys() if name.rpartition(".")[0] == parent]
    hint = _nearest(to_schema_key(key), siblings) or _nearest(key, valid_keys())
    if hint and hint != parent:
        return f"unknown key {key!r}; did you mean {hint!r}?"
    names = ", ".join(name.rpartition(".")[2] for name in siblings)
    return f"unknown key {key!r}; keys of {parent}: {names}" if parent and names else f"unknown key {key!r}; see --help"


def _explain_option(missing_file: str, options: list[str]) -> ConfigError:
    """`missing_file` is group/option as Hydra looked for it."""
    group, _, option = missing_file.removesuffix(".yaml").rpartition("/")
    options = [name for name in (options or group_options(group)) if name != "__init__"]
    hint = _nearest(option, options)
    suggestion = f"did you mean {group}={hint}? " if hint else ""
    return ConfigError(f"{group}={option}: no such option; {suggestion}options of {group}: {', '.join(options)}")


def _nearest(word: str, candidates: list[str]) -> str | None:
    """The candidate closest in spelling; a dotted word may also match by its last part alone."""
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.7)
    if close:
        return close[0]
    by_last_part = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    close = difflib.get_close_matches(word.rpartition(".")[2], list(by_last_part), n=1, cutoff=0.7)
    return by_last_part[close[0]] if close else None


def _schema_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(schema):
        dotted = prefix + field.name
        yield dotted
        nested = field.type if isinstance(field.type, type) else next(iter(typing.get_args(field.type)), None)
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from _schema_keys(nested, dotted + ".")
        if "values" in field.metadata:  # a dictionary: its keys are the user's, its values have a schema
            yield f"{dotted}.{ANY_NAME}"
            yield from _schema_keys(field.metadata["values"], f"{dotted}.{ANY_NAME}.")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]

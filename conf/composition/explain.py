"""Messages for wrong overrides: what is wrong, where, and the nearest valid spelling."""

import difflib
import re
from collections.abc import Iterable

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from conf.composition.blends import to_schema_key
from conf.composition.trees import ConfigTree
from conf.system.errors import ConfigError


def explain(error: Exception, tree: ConfigTree) -> ConfigError:
    """Turn what Hydra or OmegaConf raised while composing `tree` into a ConfigError with one message for the user."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _explain_option(error.missing_cfg_file, list(error.options or []), tree)
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
    if unknown and to_schema_key(unknown.group(1)) not in tree.keys:
        return explain_unknown_keys([unknown.group(1)], tree)
    detail = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(detail, "full_key", None)
    if key:
        return _explain_value(key, _first_line(detail), tree)
    in_file = re.match(r"In '([^']+)': \w+ raised while composing config:\n(.*)\n +full_key: (.*)", str(error))
    if in_file:
        return _explain_file(in_file[1], in_file[2], in_file[3], tree)
    return ConfigError(f"cannot compose the overrides (group=option or key=value): {' '.join(str(error).split())}")


def _explain_file(option: str, problem: str, key: str, tree: ConfigTree) -> ConfigError:
    """Return the error for a key in the YAML file of `option`, such as data/mine."""
    unknown = to_schema_key(key) not in tree.keys
    error = explain_unknown_keys([key], tree) if unknown else _explain_value(key, problem, tree)
    return ConfigError(f"{option}.yaml: {error}")


def _explain_value(key: str, problem: str, tree: ConfigTree) -> ConfigError:
    old = re.match("Invalid value '([^']*)'", problem)
    if old and (value := tree.renamed.current_value(key, old[1])) != old[1]:
        return ConfigError(f"{key}={old[1]} has been renamed; give {key}={value}")
    return ConfigError(f"{key}: {problem}")


def explain_unknown_keys(keys: Iterable[str], tree: ConfigTree) -> ConfigError:
    """Name each unknown key and the valid key nearest to it."""
    return ConfigError("; ".join(_describe_unknown(key, tree) for key in keys))


def _describe_unknown(key: str, tree: ConfigTree) -> str:
    if (current := tree.renamed.current_key(key)) != key:
        return f"{key!r} has been renamed; give {current!r}"
    parent = to_schema_key(key).rpartition(".")[0]
    valid = list(dict.fromkeys((*tree.keys, *tree.groups)))  # a group may be no key, such as a drafter's experiment
    siblings = [name for name in valid if name.rpartition(".")[0] == parent]
    hint = _nearest(to_schema_key(key), siblings) or _nearest(key, valid)
    if hint and hint != parent:
        return f"unknown key {key!r}; did you mean {hint!r}?"
    names = ", ".join(name.rpartition(".")[2] for name in siblings)
    return f"unknown key {key!r}; keys of {parent}: {names}" if parent and names else f"unknown key {key!r}; see --help"


def _explain_option(missing_file: str, options: list[str], tree: ConfigTree) -> ConfigError:
    """Name the option nearest to `missing_file`, which is group/option as Hydra looked for it."""
    group, _, option = missing_file.removesuffix(".yaml").rpartition("/")
    if instead := tree.renamed.options.get(group, {}).get(option):
        return ConfigError(f"{group}={option} no longer exists; give {instead}")
    options = [name for name in (options or tree.options(group)) if name != "__init__"]
    hint = _nearest(option, options)
    suggestion = f"did you mean {group}={hint}? " if hint else ""
    return ConfigError(f"{group}={option}: no such option; {suggestion}options of {group}: {', '.join(options)}")


def _nearest(word: str, candidates: list[str]) -> str | None:
    """Return the candidate closest in spelling; a dotted word may also match by its last part alone."""
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.7)
    if close:
        return close[0]
    by_last_part = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    close = difflib.get_close_matches(word.rpartition(".")[2], list(by_last_part), n=1, cutoff=0.7)
    return by_last_part[close[0]] if close else None


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]

"""Text of `--help` of a composed command; Hydra's own help loads every plugin and takes three times as long.

Meanings of keys are read from the docstrings of the schema: `first, second: their meaning. third: its meaning`.
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from typing import get_args

from omegaconf import OmegaConf

from conf.composition.blends import to_schema_key
from conf.composition.compose import compose_groups
from conf.composition.trees import ConfigTree, nested_schemas

WIDTH, COLUMN = 120, 44  # of the text, and where the meaning of a key begins
KEY = re.compile(r"( *)([\w-]+):")


def help_text(tree: ConfigTree, usage: str, overrides: list[str]) -> str:
    """Return usage, groups with their options, and keys with value under `overrides` and meaning.

    Raises: ConfigError if `overrides` do not compose.
    """
    keys = "\n".join(_explained_keys(tree, overrides))
    return f"{usage}\ngroups (group=option):\n{_list_groups(tree)}\nkeys (key=value; ??? must be given):\n{keys}\n"


def describe_option(tree: ConfigTree, group: str, option: str) -> str:
    """Return the first comment in the option's YAML file that is not a Hydra directive."""
    lines = (tree.folder / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    comments = (line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line)
    return next(comments, "")


def _list_groups(tree: ConfigTree) -> str:
    lines = []
    for group in tree.groups:
        lines.append(f"  {group}")
        lines += [f"    {option:<18} {describe_option(tree, group, option)}" for option in tree.options(group)]
    return "\n".join(lines) + "\n"


def _explained_keys(tree: ConfigTree, overrides: list[str]) -> Iterator[str]:
    """Yield the lines of the composed YAML, with the meaning of each key as a comment beside it."""
    known, parents = meanings(tree), []
    for line in OmegaConf.to_yaml(compose_groups(overrides, tree)).splitlines():
        key = KEY.match(line)
        if not key:  # an item of a list
            yield f"  {line}"
            continue
        parents = [*parents[: len(key[1]) // 2], key[2]]
        yield from _beside(f"  {line}", known.get(to_schema_key(".".join(parents)), ""))


def _beside(line: str, comment: str) -> Iterator[str]:
    """Yield `line` with `comment` beside it, in as many lines as the comment needs."""
    for part in textwrap.wrap(comment, WIDTH - COLUMN - 2) or [""]:
        yield f"{line:<{COLUMN - 1}} # {part}" if part else line
        line = ""


def meanings(tree: ConfigTree) -> dict[str, str]:
    """Return what every dotted key means, with the meaning of each choice where there are some, in schema order."""
    return dict(_meanings(tree.schema, ""))


def _meanings(schema: type, prefix: str) -> Iterator[tuple[str, str]]:
    described = _describe_fields(schema)
    for field in dataclasses.fields(schema):
        text = described.get(field.name, "")
        nested = list(nested_schemas(field))
        for kind in get_args(field.type) or (field.type,):  # Optional[...] has several
            if isinstance(kind, type) and issubclass(kind, Enum):
                text = " ".join(part for part in ("" if text.startswith("see ") else text, _one_line(kind)) if part)
        for _, inner in nested:
            text = text or _summary(inner)
        yield prefix + field.name, text
        for suffix, inner in nested:
            yield from _meanings(inner, f"{prefix}{field.name}{suffix}.")


def _describe_fields(schema: type) -> dict[str, str]:
    """Return what the docstring of a schema says about each field."""
    names = {field.name for field in dataclasses.fields(schema)}
    text, starts = _one_line(schema), _field_starts(schema)
    ends = [*(start.start() for start in starts[1:]), len(text)]
    described = {}
    for start, end in zip(starts, ends, strict=True):
        for name in names & set(_listed(start)):
            described[name] = text[start.end() : end].strip()
    return described


def _summary(schema: type) -> str:
    """Return the part of a schema's docstring before the first field."""
    starts = _field_starts(schema)
    return _one_line(schema)[: starts[0].start() if starts else None].strip()


def _field_starts(schema: type) -> list[re.Match[str]]:
    """Find the starts of the descriptions of fields in a schema's docstring."""
    names = {field.name for field in dataclasses.fields(schema)}
    found = re.finditer(r"(?:^|(?<=[.;] ))`?\w+`?(?:, `?\w+`?)*: ", _one_line(schema))
    return [start for start in found if set(_listed(start)) <= names]


def _listed(start: re.Match[str]) -> list[str]:
    return re.findall(r"\w+", start[0])


def _one_line(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())

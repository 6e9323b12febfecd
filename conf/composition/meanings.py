"""What every key means, read from the docstrings of the schema: `first, second: their meaning. third: its meaning`."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from typing import get_args

from conf.composition.trees import ConfigTree, nested_schemas


def meanings(tree: ConfigTree) -> dict[str, str]:
    """Dotted key -> meaning and, where there are choices, what each of them means; in schema order."""
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
    """Field name -> what the docstring says of it."""
    names = {field.name for field in dataclasses.fields(schema)}
    text, starts = _one_line(schema), _field_starts(schema)
    ends = [*(start.start() for start in starts[1:]), len(text)]
    described = {}
    for start, end in zip(starts, ends, strict=True):
        for name in names & set(_listed(start)):
            described[name] = text[start.end() : end].strip()
    return described


def _summary(schema: type) -> str:
    """What the docstring says before it comes to single fields."""
    starts = _field_starts(schema)
    return _one_line(schema)[: starts[0].start() if starts else None].strip()


def _field_starts(schema: type) -> list[re.Match[str]]:
    """Where the docstring begins to speak of fields."""
    names = {field.name for field in dataclasses.fields(schema)}
    found = re.finditer(r"(?:^|(?<=[.;] ))`?\w+`?(?:, `?\w+`?)*: ", _one_line(schema))
    return [start for start in found if set(_listed(start)) <= names]


def _listed(start: re.Match[str]) -> list[str]:
    return re.findall(r"\w+", start[0])


def _one_line(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())

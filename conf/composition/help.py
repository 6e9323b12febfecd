"""What `--help` of a composed command prints; Hydra's own help loads every plugin and takes three times as long."""

import re
import textwrap
from collections.abc import Iterator

from omegaconf import OmegaConf

from conf.composition.compose import compose_groups
from conf.composition.meanings import meanings
from conf.composition.sources import to_schema_key
from conf.composition.trees import ConfigTree

WIDTH, COLUMN = 120, 44  # of the text, and where the meaning of a key begins
KEY = re.compile(r"( *)([\w-]+):")


def help_text(tree: ConfigTree, usage: str, overrides: list[str]) -> str:
    """Usage, every group with its options, every key with its value under `overrides` and its meaning.

    Raises ConfigError.
    """
    keys = "\n".join(_explained_keys(tree, overrides))
    return f"{usage}\ngroups (group=option):\n{_list_groups(tree)}\nkeys (key=value; ??? must be given):\n{keys}\n"


def describe_option(tree: ConfigTree, group: str, option: str) -> str:
    """The first comment in the option's YAML file that is not a Hydra directive."""
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
    """The composed YAML, with the meaning of each key as a comment beside it."""
    known, parents = meanings(tree), []
    for line in OmegaConf.to_yaml(compose_groups(overrides, tree)).splitlines():
        key = KEY.match(line)
        if not key:  # an item of a list
            yield f"  {line}"
            continue
        parents = [*parents[: len(key[1]) // 2], key[2]]
        yield from _beside(f"  {line}", known.get(to_schema_key(".".join(parents)), ""))


def _beside(line: str, comment: str) -> Iterator[str]:
    """`line`, then `comment` in as many lines as it needs."""
    pieces = textwrap.wrap(comment, WIDTH - COLUMN - 2) or [""]
    for piece in pieces:
        yield f"{line:<{COLUMN - 1}} # {piece}" if piece else line
        line = ""

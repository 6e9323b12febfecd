"""Configuration trees: for each composed configuration its schema and the folder with primary config and groups."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from conf.composition.renamed import ANY_NAME, DRAFTER_RENAMES, RUN_RENAMES, RenamedNames
from conf.schema import RunConfig
from conf.schema.drafter import DrafterConfig

CONFIG_NAME = "config"  # of every tree's primary config; a folder that holds one is a tree, not a group


@dataclass(frozen=True)
class ConfigTree[Config]:
    """One composed configuration, of a run or of a drafter.

    schema: its dataclass. schema_name: name by which the defaults list of config.yaml finds the schema.
    module: package that holds config.yaml and, as folders, the groups. renamed: names that earlier versions used.
    has_blends: whether data.train and data.heldout may be blends of sources.
    """

    schema: type[Config]
    schema_name: str
    module: str
    renamed: RenamedNames
    has_blends: bool = False

    @property
    def folder(self) -> Path:
        """The package as a directory."""
        return Path(__file__).parents[2] / self.module.replace(".", "/")

    @cached_property
    def fields(self) -> dict[str, dataclasses.Field | None]:
        """The field of the schema at each dotted key that a user may set, in order; None for a name of the user's."""
        return dict(_schema_fields(self.schema))

    @property
    def keys(self) -> list[str]:
        """All dotted keys that a user may set, in schema order."""
        return list(self.fields)

    @cached_property
    def groups(self) -> list[str]:
        """Names of the config groups: the folders that hold YAML files and are no tree of their own."""
        folders = {path.parent for path in self.folder.glob("*/*.yaml")}
        return sorted(folder.name for folder in folders if not (folder / f"{CONFIG_NAME}.yaml").exists())

    def options(self, group: str) -> list[str]:
        """Names of the YAML files of one config group."""
        return sorted(path.stem for path in (self.folder / group).glob("*.yaml"))


def nested_schemas(field: dataclasses.Field) -> Iterator[tuple[str, type]]:
    """Yield (suffix of the field's dotted key, dataclass) for each dataclass below a field of a schema."""
    nested = field.type if isinstance(field.type, type) else next(iter(typing.get_args(field.type)), None)
    if isinstance(nested, type) and dataclasses.is_dataclass(nested):
        yield "", nested
    if "values" in field.metadata:  # a dictionary: its keys are the user's, its values have a schema
        yield f".{ANY_NAME}", field.metadata["values"]


def _schema_fields(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field | None]]:
    for field in dataclasses.fields(schema):
        yield prefix + field.name, field
        for suffix, nested in nested_schemas(field):
            if suffix:
                yield prefix + field.name + suffix, None
            yield from _schema_fields(nested, f"{prefix}{field.name}{suffix}.")


RUN_TREE = ConfigTree(RunConfig, "run_config", "conf", RUN_RENAMES, has_blends=True)
DRAFTER_TREE = ConfigTree(DrafterConfig, "drafter_config", "conf.drafter", DRAFTER_RENAMES)

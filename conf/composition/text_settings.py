"""Settings that are text keep the text that was typed: Hydra would read run.name=83e2010 as a number, infinity."""

import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from conf.composition.blends import BLEND_KEYS, to_schema_key
from conf.composition.trees import ConfigTree

_ASSIGNMENT = re.compile(r"(?P<key>\+{0,2}(?P<name>[\w.<>-]+))=(?P<value>[^'\"\[\]{},]+)", re.DOTALL)


def keep_text(overrides: list[str], tree: ConfigTree) -> list[str]:
    """Quote what looks like a number or a truth value where the schema has text; null stays null."""
    keys = {key for key, field in tree.fields.items() if field is not None and field.type in (str, str | None)}
    keys |= {*BLEND_KEYS}
    return [_keep(override, keys) for override in overrides]


def _keep(override: str, text_keys: set[str]) -> str:
    assignment = _ASSIGNMENT.fullmatch(override)
    if assignment is None or to_schema_key(assignment["name"]) not in text_keys:
        return override
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        return override  # whoever composes says what is wrong with it
    return f"{assignment['key']}='{assignment['value']}'" if isinstance(value, bool | int | float) else override

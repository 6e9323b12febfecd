"""Blends: `data.train` and `data.heldout` are one path of tokenised data or a blend {name: SourceConfig}."""

import re
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.composition.renamed import ANY_NAME
from conf.schema import DataConfig, SourceConfig
from conf.system.errors import ConfigError

BLEND_KEYS = ("data.train", "data.heldout")


def to_schema_key(key: str) -> str:
    """Replace the name of a source: `data.train.web.weight` -> `data.train.<source>.weight`; leave other keys alone."""
    for blend in BLEND_KEYS:
        if key.startswith(blend + "."):
            _, _, rest = key.removeprefix(blend + ".").partition(".")
            return ".".join(filter(None, (blend, ANY_NAME, rest)))
    return key


def allow_new_keys(overrides: list[str]) -> list[str]:
    """Let overrides add keys to sources: `data.train.web.tokens=1e9` becomes `++data.train.web.tokens=1e9`.

    Hydra itself only changes keys that a YAML file names. What the schema does not know is still refused later.
    """
    source_key = re.compile(rf"(?:{'|'.join(map(re.escape, BLEND_KEYS))})\.[\w-]+\.[\w.]+=")
    return [f"++{override}" if source_key.match(override) else override for override in overrides]


def read_blends(data: DataConfig) -> DataConfig:
    """Turn train and heldout of `data` into dict[str, SourceConfig]; an absent heldout is empty. Raises ConfigError."""
    if data.train is None:
        raise ConfigError("data.train is null: give the path of tokenised data, or a blend of sources")
    data.train = _read_blend(data.train, "data.train")
    data.heldout = _read_blend({} if data.heldout is None else data.heldout, "data.heldout")
    return data


def _read_blend(value: Any, key: str) -> dict[str, SourceConfig]:
    if isinstance(value, str):
        return {re.sub(r"[^\w-]", "_", Path(value).name) or "data": SourceConfig(path=value)}
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value!r} is neither the path of tokenised data nor a blend {{name: {{path: ...}}}}")
    return {str(name): _read_source(source, f"{key}.{name}") for name, source in value.items()}


def check_source_names(data: dict[str, Any]) -> None:
    """Refuse names of sources that cannot be parts of dotted keys. data: plain containers. Raises ConfigError."""
    for key in BLEND_KEYS:
        sources = data.get(key.rpartition(".")[2])
        for name in sources if isinstance(sources, dict) else ():
            if not re.fullmatch(r"[\w-]+", str(name)):
                raise ConfigError(f"{key}: {name!r} cannot name a source; use letters, digits, '_' and '-'")


def _read_source(value: Any, key: str) -> SourceConfig:
    if isinstance(value, str):
        return SourceConfig(path=value)
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value!r} is neither a path nor a source with the keys path, weight, tokens, input")
    try:
        source = cast(SourceConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), value)))
    except OmegaConfBaseException as error:
        wrong = f"{key}.{error.full_key}" if error.full_key else key
        raise ConfigError(f"{wrong}: {str(error).splitlines()[0]}") from error
    return source

"""Composition of YAML groups and command-line overrides into typed dataclasses. Knows Hydra; imports no torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.composition.blends import allow_new_keys, check_source_names, read_blends, to_schema_key
from conf.composition.explain import explain, explain_unknown_keys
from conf.composition.text_settings import keep_text
from conf.composition.trees import CONFIG_NAME, DRAFTER_TREE, RUN_TREE, ConfigTree
from conf.schema import DataConfig, ParallelConfig, RunConfig
from conf.schema.drafter import DrafterConfig
from conf.system.errors import ConfigError


def register_schema(tree: ConfigTree) -> None:
    """Register the tree's schema with Hydra under the name its config.yaml uses; a second time changes nothing."""
    ConfigStore.instance().store(name=tree.schema_name, node=tree.schema)


def compose_run_config(overrides: list[str]) -> RunConfig:
    """Compose as the command line would: `compose_run_config(["stage=joint", "train.tokens=1e6", ...])`.

    Raises ConfigError naming the key or group option that is wrong and the nearest valid one.
    """
    return to_config(compose_groups(overrides), RUN_TREE)


def compose_drafter_config(overrides: list[str]) -> DrafterConfig:
    """Compose as the command line of lora.train would; see compose_run_config. Raises ConfigError."""
    return to_config(compose_groups(overrides, DRAFTER_TREE), DRAFTER_TREE)


def compose_size(overrides: list[str]) -> RunConfig:
    """Compose a run of which only size and layout matter.

    Data, tokenizer and start weights need not be given and are left out if they are. Raises ConfigError.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(compose_groups(overrides), resolve=False))
    _refuse_unknown(plain, RUN_TREE)
    form = {key: plain["data"][key] for key in ("sequence_length", "isolate_documents")}
    plain |= {"data": form | {"train": {}, "heldout": {}, "tokenizer": ""}, "init_from": None}
    return to_config(OmegaConf.create(plain), RUN_TREE)


def compose_groups(overrides: list[str], tree: ConfigTree = RUN_TREE) -> DictConfig:
    """Compose with Hydra alone: values may be missing (???) and interpolations unresolved. Raises ConfigError."""
    register_schema(tree)
    try:
        with initialize_config_module(tree.module, version_base="1.3"):
            composed = compose(CONFIG_NAME, prepare_overrides(overrides, tree))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise explain(error, tree) from error
    refuse_hidden_layout(overrides, composed, tree)
    return composed


def prepare_overrides(overrides: list[str], tree: ConfigTree) -> list[str]:
    """Return the overrides as Hydra must get them: text stays text, and sources of a blend may have new keys."""
    overrides = keep_text(overrides, tree)
    return allow_new_keys(overrides) if tree.has_blends else overrides


def refuse_hidden_layout(overrides: list[str], composed: DictConfig, tree: ConfigTree) -> None:
    """Refuse an option of `parallel` that would have no effect because the experiment sets its keys, too.

    An experiment has the last word over options, not over keys. Raises ConfigError with the keys to give.
    """
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    option = given.get("parallel")
    if option not in (tree.options("parallel") if "parallel" in tree.groups else ()):
        return
    layout = OmegaConf.load(tree.folder / "parallel" / f"{option}.yaml")
    keys = [
        OmegaConf.to_yaml(OmegaConf.create({f"parallel.{key}": value})).strip().replace(": ", "=")
        for key, value in layout.items()
        if composed.parallel[key] != value and f"parallel.{key}" not in given
    ]
    if keys:
        raise ConfigError(
            f"parallel={option} has no effect on keys that experiment={given.get('experiment')} sets; give instead: "
            f"{' '.join(keys)}"
        )


def compose_layout(words: Sequence[str]) -> ParallelConfig:
    """Compose a parallel layout without a run: `compose_layout(["tensor_parallel=2", "pipeline_parallel=2"])`.

    words: keys of `parallel`, with or without that prefix, or an option of it. Raises ConfigError naming the nearest.
    """
    overrides = [f"parallel.{word}" if "=" in word else f"parallel={word}" for word in words]
    overrides = [override.replace("parallel.parallel", "parallel", 1) for override in overrides]
    merged = OmegaConf.merge(OmegaConf.structured(ParallelConfig), compose_groups(overrides).parallel)
    return cast(ParallelConfig, OmegaConf.to_object(merged))


def compose_data(overrides: list[str], config_dir: Path | None = None) -> DataConfig:
    """Compose the data of a run; what the rest of the run lacks does not matter.

    config_dir: a folder of the user's own options (`<config_dir>/data/mine.yaml` for data=mine).
    Raises ConfigError as compose_run_config does.
    """
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"the configuration folder {config_dir} does not exist")
        overrides = [*overrides, f"hydra.searchpath=[file://{config_dir.resolve()}]"]
    composed = compose_groups(overrides)
    _refuse_unknown(OmegaConf.to_container(composed, resolve=False), RUN_TREE)
    _refuse_missing(OmegaConf.to_container(composed.data, resolve=False), "data")
    try:
        plain = OmegaConf.to_container(composed.data, resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(DataConfig), plain)
        return read_blends(cast(DataConfig, OmegaConf.to_object(merged)))
    except OmegaConfBaseException as error:
        raise explain(error, RUN_TREE) from error


def to_config[Config](composed: DictConfig, tree: ConfigTree[Config]) -> Config:
    """Check a composed configuration against the schema and return it as dataclasses, interpolations resolved.

    Raises ConfigError for keys the schema does not have (Hydra itself accepts `+x=1`), for values of the wrong type,
    and, in one message, for every value still missing.
    """
    plain = OmegaConf.to_container(composed, resolve=False)
    _refuse_unknown(plain, tree)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(tree.schema), plain)
        _refuse_missing(OmegaConf.to_container(merged, resolve=False))
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise explain(error, tree) from error
    if isinstance(config, RunConfig):
        read_blends(config.data)
    return config


def load_run_config(path: Path) -> RunConfig:
    """Read the config.yaml of a run folder, also one that an earlier version wrote.

    Raises ConfigError if the file is not there, is no YAML mapping, or does not fit today's schema.
    """
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # the YAML library's own exceptions have no common public base
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} does not hold the configuration of a run")
    plain = cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=False))
    return to_config(OmegaConf.create(RUN_TREE.renamed.read_old(plain)), RUN_TREE)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of everything in a nested dict that is not itself a non-empty dict."""
    if not isinstance(node, dict) or not node:
        yield prefix, node
        return
    for name, child in node.items():
        yield from _leaves(child, f"{prefix}.{name}" if prefix else str(name))


def _refuse_unknown(plain: Any, tree: ConfigTree) -> None:
    if tree.has_blends:
        check_source_names(plain.get("data") or {})
    known = set(tree.keys)
    unknown = [key for key, _ in _leaves(plain) if to_schema_key(key) not in known]
    if unknown:
        raise explain_unknown_keys(unknown, tree)


def _refuse_missing(plain: Any, prefix: str = "") -> None:
    missing = [key for key, value in _leaves(plain, prefix) if value == MISSING]
    if missing:
        raise ConfigError(f"missing required values; give: {' '.join(f'{key}=...' for key in missing)}")

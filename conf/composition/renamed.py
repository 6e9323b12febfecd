"""Names that earlier versions gave to keys, values and options, and what is given today instead.

Commands refuse an old name with a message that says the new one. Configurations that earlier versions wrote into run
folders and checkpoints are read under today's names. A name stays here as long as such files may exist.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

ANY_NAME = "<source>"  # stands for a source's name in dotted keys


@dataclass(frozen=True)
class RenamedNames:
    """The old names of one configuration tree.

    keys: old dotted key -> new one; a key that holds others renames all of them. values: dotted key (today's) ->
    {old value: new value}. options: group -> {old option: the overrides that do the same}.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def current_key(self, key: str) -> str:
        """Return the name that `key` has today: another one if it was renamed, else the same."""
        for old, new in self.keys.items():
            if match := _match(old, key):
                names, below = match
                return ".".join([*(names.pop(0) if part == ANY_NAME else part for part in new.split(".")), *below])
        return key

    def current_value(self, key: str, value: Any) -> Any:
        """Return what `value` of `key` (today's name) is called today."""
        for known, values in self.values.items():
            match = _match(known, key)
            if match and not match[1] and isinstance(value, str):
                return values.get(value, value)
        return value

    def read_old(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a configuration that an earlier version wrote, as nested dictionaries, under today's names."""
        renamed: dict[str, Any] = {}
        for old_key, value in _walk(config):
            *parents, name = (key := self.current_key(old_key)).split(".")
            place = renamed
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = self.current_value(key, value)
        return renamed


def _match(pattern: str, key: str) -> tuple[list[str], list[str]] | None:
    """Return the names that `<source>` stands for and the parts of `key` below `pattern`; None if it does not match."""
    expected, parts = pattern.split("."), key.split(".")
    found = list(zip(expected, parts, strict=False))
    if len(parts) < len(expected) or any(one not in (ANY_NAME, part) for one, part in found):
        return None
    return [part for one, part in found if one == ANY_NAME], parts[len(expected) :]


def _walk(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for everything that is not a mapping with something in it."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


RUN_RENAMES = RenamedNames(
    keys={
        "data.completion_loss": "data.block_padding_loss",
        "data.train.<source>.input.rows": "data.train.<source>.input.records",
        "data.heldout.<source>.input.rows": "data.heldout.<source>.input.records",
    },
    values={
        "runtime.attention_backend": {"split": "cpu"},
    },
    options={
        "parallel": {
            "tp2": "parallel.tensor_parallel=2",
            "tp2_sp": "parallel.tensor_parallel=2 parallel.sequence_parallel=true",
            "tp4": "parallel.tensor_parallel=4",
            "tp4_sp": "parallel.tensor_parallel=4 parallel.sequence_parallel=true",
            "tp8": "parallel.tensor_parallel=8",
            "tp8_sp": "parallel.tensor_parallel=8 parallel.sequence_parallel=true",
            "pp2": "parallel.pipeline_parallel=2",
            "pp2_interleaved": "parallel.pipeline_parallel=2 parallel.virtual_pipeline_parallel=2",
            "tp2_pp2": "parallel.tensor_parallel=2 parallel.pipeline_parallel=2",
            "tp4_sp_pp2": ("parallel.tensor_parallel=4 parallel.pipeline_parallel=2 parallel.sequence_parallel=true"),
            "cp2": "parallel.context_parallel=2",
            "tp2_sp_cp2": "parallel.tensor_parallel=2 parallel.context_parallel=2 parallel.sequence_parallel=true",
            "tp8_sp_cp4": "parallel.tensor_parallel=8 parallel.context_parallel=4 parallel.sequence_parallel=true",
            "h100_tp2": "parallel=h100 parallel.tensor_parallel=2 parallel.sequence_parallel=true",
            "h100_tp4": "parallel=h100 parallel.tensor_parallel=4 parallel.sequence_parallel=true",
        },
    },
)
DRAFTER_RENAMES = RenamedNames(
    keys={
        "answers": "responses",
        "train.peak_lr": "schedule.peak_lr",
        "train.final_lr": "schedule.final_lr",
        "train.warmup_fraction": "schedule.warmup_fraction",
        "train.weight_decay": "optimizer.weight_decay",
        "train.clip_norm": "optimizer.clip_norm",
    },
)

"""Finds the settings in which a resumed run differs from the run that wrote its checkpoint."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from conf.schema import DecayShape, ScheduleConfig, ScheduleKind
from pretrain.step.learning_rate import compute_learning_rate

ABSENT = "(absent)"
# Where, in which layout and how watched a run happens. Whatever else changed is about what is learned.
_ABOUT_RUNNING = re.compile(
    r"(run|runtime|resume|parallel|checkpoint|evaluation)\..*|init_from|experiment|model\.name"
    r"|data\.(folder|tokenizer|prefetch_steps|image_workers|heldout\..*|prepare\..*|train\.[^.]+\.(path|input\b.*))"
)


@dataclass(frozen=True)
class ConfigChange:
    """Names a setting that differs. key: dotted. then, now: values, or ABSENT."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {_show(self.then)} -> {_show(self.now)}"

    @property
    def is_about_training(self) -> bool:
        """Whether it may change what is learned, beyond rounding."""
        return _ABOUT_RUNNING.fullmatch(self.key) is None


def compare_configs(then: dict[str, Any], now: dict[str, Any]) -> tuple[ConfigChange, ...]:
    """Return every setting that differs between two resolved configurations in plain containers, in the order of `now`.

    An empty `then` (a checkpoint that knows no configuration) differs in nothing; null says no more than nothing does.
    """
    if not then:
        return ()
    # As JSON, in which the checkpoint keeps them: no tuples, no keys but strings.
    theirs, ours = dict(_flatten(then)), dict(_flatten(json.loads(json.dumps(now))))
    keys = [*ours, *(key for key in theirs if key not in ours)]
    values = ((key, theirs.get(key, ABSENT), ours.get(key, ABSENT)) for key in keys)
    return tuple(
        ConfigChange(key, was, is_now)
        for key, was, is_now in values
        if was != is_now and not {ABSENT, None}.issuperset((was, is_now))
    )


def describe_changes(changes: tuple[ConfigChange, ...], step: int) -> Iterator[str]:
    """Yield at most two lines: what changes training since `step`, and what merely changes how it runs."""
    training = [str(change) for change in changes if change.is_about_training]
    running = [str(change) for change in changes if not change.is_about_training]
    if training:
        yield f"resume: {_count(training)} changed since step {step}: {'; '.join(training)}"
    if running:
        yield f"resume: {_count(running)} changed about where and how it runs: {'; '.join(running)}"


def describe_learning_rate(then: dict[str, Any], now: dict[str, Any], tokens_seen: int) -> Iterator[str]:
    """Yield one line if the next step has another learning rate than it would have had."""
    if not then:
        return
    was, will_be = (_next_learning_rate(config, tokens_seen) for config in (then, now))
    if was != will_be:
        yield f"resume: the learning rate of the next step is {will_be:.4g}, it would have been {was:.4g}"


def _next_learning_rate(config: dict[str, Any], tokens_seen: int) -> float:
    known = {field.name for field in fields(ScheduleConfig)}
    values = {key: value for key, value in config["schedule"].items() if key in known}
    kind, shape = ScheduleKind(values.pop("kind")), DecayShape(values.pop("decay_shape"))
    tokens_after = tokens_seen + config["train"]["global_batch_size"] * config["data"]["sequence_length"]
    schedule = ScheduleConfig(kind=kind, decay_shape=shape, **values)
    return compute_learning_rate(schedule, tokens_after / config["train"]["tokens"])


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _count(changes: list[str]) -> str:
    return f"{len(changes)} setting{'s' if len(changes) > 1 else ''}"

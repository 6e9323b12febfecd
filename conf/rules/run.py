"""Rules between settings, checked before a process group or a model exists.

Each rule is a generator of messages naming keys, values and a remedy; check_rules collects them all, so that one
attempt shows everything there is to fix. What depends on files or hardware is checked where those are opened.
"""

import os
from collections import Counter
from collections.abc import Callable
from math import isfinite

from conf.rules.layout import LAYOUT_RULES, WORLD_RULES
from conf.rules.levers import LEVER_RULES
from conf.rules.optimization import learning_rate_falls
from conf.rules.ranges import RUN_RANGES, broken_ranges, read_key
from conf.rules.violations import Violations, refuse_violations
from conf.rules.vision import VISION_RULES
from conf.schema import (
    AttentionBackend,
    Device,
    RunConfig,
    SourceConfig,
    SpikePolicy,
)

BUDGET_TOLERANCE = 0.01  # relative, between the sources' token budgets and the run's


def check_rules(config: RunConfig, world_size: int) -> None:
    """Check `config` for a run on `world_size` ranks.

    Raises ConfigError listing every violated rule.
    """
    of_run = [rule(config) for rule in _RULES]
    of_world = [rule(config, world_size) for rule in WORLD_RULES]
    refuse_violations([broken_ranges(config, RUN_RANGES), *of_run, *of_world])


def _names_are_given(config: RunConfig) -> Violations:
    for key in ("run.name", "run.dir", "model.name", "stage.name"):
        if not read_key(config, key):
            yield f"{key} is empty; give it a name"


def _heads_share_key_value_heads(config: RunConfig) -> Violations:
    model = config.model
    if model.num_attention_heads % model.num_key_value_heads:
        yield (
            f"model.num_attention_heads={model.num_attention_heads} is not a multiple of "
            f"model.num_key_value_heads={model.num_key_value_heads}; each key/value head serves equally many queries"
        )
    if model.head_dim % 2:
        yield f"model.head_dim={model.head_dim} is odd; rotary embeddings turn two dimensions together, so make it even"


def _sources_share_the_run(config: RunConfig) -> Violations:
    for key, sources in (("data.train", config.data.train), ("data.heldout", config.data.heldout)):
        if len(sources) > 1:
            yield from _sources_have_shares(key, sources)
        for name, source in sources.items():
            if source.weight is not None and source.tokens is not None:
                yield f"{key}.{name} has both a weight and tokens; give one of them"
            for unit in ("weight", "tokens"):
                value = getattr(source, unit)
                if value is not None and not (isfinite(value) and value > 0):
                    yield f"{key}.{name}.{unit}={value} must be positive and finite; leave a source out to not use it"
    budgets = [source.tokens for source in config.data.train.values()]
    if budgets and None not in budgets and abs(sum(budgets) / config.train.tokens - 1) > BUDGET_TOLERANCE:
        yield (
            f"the token budgets of data.train sum to {sum(budgets):g}, train.tokens={config.train.tokens:g}; "
            "make them agree, or give weights instead"
        )


def _sources_have_shares(key: str, sources: dict[str, SourceConfig]) -> Violations:
    weighted = [name for name, source in sources.items() if source.weight is not None]
    budgeted = [name for name, source in sources.items() if source.tokens is not None]
    if sorted([*weighted, *budgeted]) != sorted(sources) or (weighted and budgeted):
        yield (
            f"{key} blends {', '.join(sources)}: give each of them a weight, or each of them tokens "
            f"(weight: {', '.join(weighted) or 'none'}; tokens: {', '.join(budgeted) or 'none'})"
        )
    paths = {name: os.path.abspath(source.path) for name, source in sources.items()}
    for path in sorted(path for path, count in Counter(paths.values()).items() if count > 1):
        names = [name for name, its in paths.items() if its == path]
        yield f"{key} names {path} more than once ({', '.join(names)}); name it once with a larger weight"


def _sequence_fits_positions(config: RunConfig) -> Violations:
    length, longest = config.data.sequence_length, config.model.max_position_embeddings
    if length > longest:
        yield (
            f"data.sequence_length={length} exceeds model.max_position_embeddings={longest}; "
            "shorten the sequence or raise what the model claims"
        )


def _spikes_can_be_noticed_and_undone(config: RunConfig) -> Violations:
    if config.guard.spike_policy is SpikePolicy.roll_back and not config.checkpoint.every_steps:
        yield (
            "guard.spike_policy=roll_back goes back to a checkpoint, and checkpoint.every_steps=0 makes none before "
            "the end; give every_steps, or another policy"
        )
    if config.guard.spike_factor <= 1:
        yield f"guard.spike_factor={config.guard.spike_factor:g} makes every second loss a spike; give one above 1"


def _yarn_bounds_are_ordered(config: RunConfig) -> Violations:
    rope = config.model.rope
    if rope.beta_fast <= rope.beta_slow:
        yield (
            f"model.rope.beta_fast={rope.beta_fast:g} must be larger than model.rope.beta_slow={rope.beta_slow:g}; "
            "released checkpoints have 32 and 1"
        )


def _flex_attention_needs_cuda(config: RunConfig) -> Violations:
    if config.runtime.attention_backend is AttentionBackend.flex and config.runtime.device is Device.cpu:
        yield (
            "runtime.attention_backend=flex has no backward pass on the CPU (runtime.device=cpu); "
            "use runtime.attention_backend=cpu"
        )


_RULES: list[Callable[[RunConfig], Violations]] = [
    _names_are_given,
    _heads_share_key_value_heads,
    _sources_share_the_run,
    _sequence_fits_positions,
    *LAYOUT_RULES,
    *LEVER_RULES,
    *VISION_RULES,
    learning_rate_falls,
    _spikes_can_be_noticed_and_undone,
    _yarn_bounds_are_ordered,
    _flex_attention_needs_cuda,
]

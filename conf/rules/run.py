"""Rules between settings, checked before a process group or a model exists.

Each rule is a generator of messages naming keys, values and a remedy; check_rules collects them all, so that one
attempt shows everything there is to mend. What depends on files or hardware is checked where those are opened.
"""

import os
from collections import Counter
from collections.abc import Callable
from math import isfinite, lcm

from conf.rules.levers import LEVER_RULES
from conf.rules.optimization import learning_rate_falls
from conf.rules.ranges import RUN_RANGES, broken_ranges, read_key
from conf.rules.violations import Violations, refuse_violations
from conf.schema import (
    AttentionBackend,
    Device,
    ModelConfig,
    Objective,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    SpikePolicy,
)

BUDGET_TOLERANCE = 0.01  # relative, between the sources' token budgets and the run's


def check_rules(config: RunConfig, world_size: int) -> None:
    """Check `config` for a run on `world_size` ranks.

    Raises ConfigError listing every violated rule.
    """
    of_world = [rule(config, world_size) for rule in _WORLD_RULES]
    refuse_violations([broken_ranges(config, RUN_RANGES), *(rule(config) for rule in _RULES), *of_world])


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that `model` can be laid out so, outside a run (a conversion). Raises ConfigError."""
    config = RunConfig(model=model, parallel=parallel)
    rules = (_tensor_parallel_divides_model, _chunks_divide_layers, _interleaving_needs_pipeline)
    refuse_violations(rule(config) for rule in rules)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Ranks left for data parallelism; `world_size` is a multiple of tensor * context * pipeline degrees."""
    return world_size // config.parallel.model_parallel


def num_microbatches(config: RunConfig, world_size: int) -> int:
    """Of a rank's step; the global batch is a multiple of what all ranks take at a time."""
    train = config.train
    return train.global_batch_size // (train.micro_batch_size * data_parallel_size(config, world_size))


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
        yield f"model.head_dim={model.head_dim} is odd; rotary embeddings turn pairs, so make it even"


def _tensor_parallel_divides_model(config: RunConfig) -> Violations:
    degree = config.parallel.tensor_parallel
    for name in ("num_attention_heads", "num_key_value_heads", "ffn_hidden_size", "vocab_size"):
        value = getattr(config.model, name)
        if value % degree:
            yield (
                f"model.{name}={value} is not divisible by parallel.tensor_parallel={degree}; {_choices(value, degree)}"
            )


def _chunks_divide_layers(config: RunConfig) -> Violations:
    parallel, layers = config.parallel, config.model.num_layers
    chunks = parallel.pipeline_parallel * parallel.virtual_pipeline_parallel
    if layers % chunks:
        yield (
            f"model.num_layers={layers} is not divisible by parallel.pipeline_parallel={parallel.pipeline_parallel} * "
            f"parallel.virtual_pipeline_parallel={parallel.virtual_pipeline_parallel}; "
            f"for their product {_choices(layers, chunks)}"
        )


def _interleaving_needs_pipeline(config: RunConfig) -> Violations:
    parallel = config.parallel
    if parallel.virtual_pipeline_parallel > 1 and parallel.pipeline_parallel == 1:
        yield (
            f"parallel.virtual_pipeline_parallel={parallel.virtual_pipeline_parallel} needs "
            "parallel.pipeline_parallel of 2 or more; set it to 1 or add pipeline stages"
        )


def _blocks_divide_sequence(config: RunConfig) -> Violations:
    length, block = config.data.sequence_length, config.stage.block_size
    if length % block:
        yield (
            f"data.sequence_length={length} is not a multiple of stage.block_size={block}; "
            f"use for example data.sequence_length={_nearest_length(config)}"
        )


def _nearest_length(config: RunConfig) -> int:
    """Of a sequence that blocks and context-parallel ranks can share, at or below the one that is given if there is."""
    block, degree = config.stage.block_size, config.parallel.context_parallel
    chunks = 2 * degree if degree > 1 else 1
    unit = block * chunks if config.stage.objective is Objective.joint else lcm(block, chunks)
    return max(unit, config.data.sequence_length // unit * unit)


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


def _context_parallel_cuts_no_block(config: RunConfig) -> Violations:
    """Each rank holds two equal chunks of a sequence; in the joint stage they consist of whole blocks."""
    length, degree = config.data.sequence_length, config.parallel.context_parallel
    is_joint = config.stage.objective is Objective.joint
    chunk, block = 2 * degree, config.stage.block_size if is_joint else 1
    if degree == 1 or length % (chunk * block) == 0 or length % config.stage.block_size:
        return  # the last is reported above, with a length that fits both
    remedy = f"use for example data.sequence_length={_nearest_length(config)}, or a smaller degree"
    if length % chunk:
        yield f"parallel.context_parallel={degree} cuts sequences into {chunk} equal chunks, and " + (
            f"data.sequence_length={length} is not a multiple of {chunk}; {remedy}"
        )
        return
    yield (
        f"parallel.context_parallel={degree} cuts data.sequence_length={length} into {chunk} chunks of "
        f"{length // chunk} tokens, and stage.block_size={block} does not divide these; {remedy}"
    )


def _sequence_parallel_divides_rows(config: RunConfig) -> Violations:
    degree = config.parallel.tensor_parallel
    if not config.parallel.sequence_parallel:
        return
    if degree == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor_parallel of 2 or more; set it or switch this off"
    halves = config.stage.rows_per_token
    context = config.parallel.context_parallel
    rows, rest = divmod(halves * config.data.sequence_length, context)
    if rows % degree and not rest:
        shared = f" / parallel.context_parallel={context}" if context > 1 else ""
        yield (
            f"sequence_parallel splits {rows} rows ({halves} * data.sequence_length{shared}) over "
            f"parallel.tensor_parallel={degree}, which does not divide them; change either or switch it off"
        )


def _parameter_overlap_needs_gradient_overlap(config: RunConfig) -> Violations:
    parallel = config.parallel
    if parallel.overlap_grad_reduce:
        return
    if parallel.overlap_param_gather:
        yield "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true; set it or switch it off"
    if parallel.bucket_parameters is not None:
        yield (
            f"parallel.bucket_parameters={parallel.bucket_parameters} has no effect without "
            "parallel.overlap_grad_reduce=true; set that, or parallel.bucket_parameters=null"
        )


def _spikes_can_be_told_and_undone(config: RunConfig) -> Violations:
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
            "use runtime.attention_backend=split"
        )


def _model_parallel_divides_world(config: RunConfig, world_size: int) -> Violations:
    parallel = config.parallel
    if min(parallel.tensor_parallel, parallel.context_parallel, parallel.pipeline_parallel) < 1:
        return  # conf/rules/ranges.py says so
    context = f"parallel.context_parallel={parallel.context_parallel} * " if parallel.context_parallel > 1 else ""
    if world_size % parallel.model_parallel:
        yield (
            f"{world_size} ranks are not a multiple of parallel.tensor_parallel={parallel.tensor_parallel} * "
            f"{context}parallel.pipeline_parallel={parallel.pipeline_parallel} = {parallel.model_parallel}; start "
            f"torchrun --nproc_per_node={parallel.model_parallel} (or a multiple), or choose another parallel=..."
        )


def _batch_divides_over_data_parallel(config: RunConfig, world_size: int) -> Violations:
    if world_size % config.parallel.model_parallel:
        return  # reported above; there is no data-parallel degree to speak of
    train, ranks = config.train, data_parallel_size(config, world_size)
    together = train.micro_batch_size * ranks
    if train.global_batch_size % together:
        nearest = max(together, train.global_batch_size // together * together)
        yield (
            f"train.global_batch_size={train.global_batch_size} is not divisible by train.micro_batch_size="
            f"{train.micro_batch_size} * {ranks} data-parallel ranks; use for example train.global_batch_size={nearest}"
        )
        return
    yield from _microbatches_fill_interleaved_schedule(config, num_microbatches(config, world_size))


def _microbatches_fill_interleaved_schedule(config: RunConfig, count: int) -> Violations:
    parallel = config.parallel
    if parallel.virtual_pipeline_parallel > 1 and count % parallel.pipeline_parallel:
        yield (
            f"the interleaved schedule needs the {count} microbatches of a step to be a multiple of "
            f"parallel.pipeline_parallel={parallel.pipeline_parallel}; change train.global_batch_size or "
            "train.micro_batch_size, or set parallel.virtual_pipeline_parallel=1"
        )


def _choices(value: int, wrong: int) -> str:
    """The divisors of `value` nearest to the degree that was asked for."""
    divisors = [number for number in range(1, min(value, 64) + 1) if value % number == 0]
    nearest = sorted(sorted(divisors, key=lambda number: abs(number - wrong))[:4])
    return f"choose among {', '.join(str(number) for number in nearest)}"


_RULES: list[Callable[[RunConfig], Violations]] = [
    _names_are_given,
    _heads_share_key_value_heads,
    _tensor_parallel_divides_model,
    _chunks_divide_layers,
    _interleaving_needs_pipeline,
    _sources_share_the_run,
    _blocks_divide_sequence,
    _sequence_fits_positions,
    _context_parallel_cuts_no_block,
    _sequence_parallel_divides_rows,
    _parameter_overlap_needs_gradient_overlap,
    *LEVER_RULES,
    learning_rate_falls,
    _spikes_can_be_told_and_undone,
    _yarn_bounds_are_ordered,
    _flex_attention_needs_cuda,
]
_WORLD_RULES: list[Callable[[RunConfig, int], Violations]] = [
    _model_parallel_divides_world,
    _batch_divides_over_data_parallel,
]

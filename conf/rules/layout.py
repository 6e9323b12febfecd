"""Rules of how model, sequences and batch are divided over ranks."""

from collections.abc import Callable
from math import lcm

from conf.rules.violations import Violations, refuse_violations
from conf.schema import ModelConfig, Objective, ParallelConfig, RunConfig


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that `model` can have the layout `parallel`, without a run (for a conversion). Raises ConfigError."""
    config = RunConfig(model=model, parallel=parallel)
    rules = (_tensor_parallel_divides_model, _chunks_divide_layers, _interleaving_needs_pipeline)
    refuse_violations(rule(config) for rule in rules)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Return the data-parallel degree; `world_size` is a multiple of tensor * context * pipeline degrees."""
    return world_size // config.parallel.model_parallel


def num_microbatches(config: RunConfig, world_size: int) -> int:
    """Return the microbatches of a rank's step; the global batch is a multiple of what all ranks take at a time."""
    train = config.train
    return train.global_batch_size // (train.micro_batch_size * data_parallel_size(config, world_size))


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
    """Return the longest length up to the given one that blocks and context-parallel ranks divide, or the shortest."""
    block, degree = config.stage.block_size, config.parallel.context_parallel
    chunks = 2 * degree if degree > 1 else 1
    unit = block * chunks if config.stage.objective is Objective.joint else lcm(block, chunks)
    return max(unit, config.data.sequence_length // unit * unit)


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


def _sequence_parallel_divides_positions(config: RunConfig) -> Violations:
    degree = config.parallel.tensor_parallel
    if not config.parallel.sequence_parallel:
        return
    if degree == 1:
        yield "parallel.sequence_parallel=true needs parallel.tensor_parallel of 2 or more; set it or switch this off"
    halves = config.stage.positions_per_token
    context = config.parallel.context_parallel
    positions, rest = divmod(halves * config.data.sequence_length, context)
    if positions % degree and not rest:
        shared = f" / parallel.context_parallel={context}" if context > 1 else ""
        yield (
            f"sequence_parallel splits {positions} positions ({halves} * data.sequence_length{shared}) over "
            f"parallel.tensor_parallel={degree}, which does not divide them; change either or switch it off"
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
    """List the divisors of `value` nearest to the degree that was asked for."""
    divisors = [number for number in range(1, min(value, 64) + 1) if value % number == 0]
    nearest = sorted(sorted(divisors, key=lambda number: abs(number - wrong))[:4])
    return f"choose among {', '.join(str(number) for number in nearest)}"


LAYOUT_RULES: list[Callable[[RunConfig], Violations]] = [
    _tensor_parallel_divides_model,
    _chunks_divide_layers,
    _interleaving_needs_pipeline,
    _blocks_divide_sequence,
    _context_parallel_cuts_no_block,
    _sequence_parallel_divides_positions,
]
WORLD_RULES: list[Callable[[RunConfig, int], Violations]] = [
    _model_parallel_divides_world,
    _batch_divides_over_data_parallel,
]

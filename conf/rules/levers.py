"""Rules of what makes a step faster or smaller on a GPU: overlap, offload, 8-bit matmuls.

What the machine must have for them is checked when the model is built (model/megatron/kernel_choice.py).
"""

from collections.abc import Callable, Iterator

from conf.rules.violations import Violations
from conf.schema import Device, Dtype, Fp8Recipe, Objective, Recompute, RunConfig


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


def _tensor_overlap_splits_the_sequence(config: RunConfig) -> Violations:
    parallel, device = config.parallel, config.runtime.device
    if not parallel.overlap_tensor_parallel:
        return
    if not parallel.sequence_parallel:
        yield (
            "parallel.overlap_tensor_parallel=true overlaps the collectives of sequence parallelism; set "
            "parallel.sequence_parallel=true (with parallel.tensor_parallel of 2 or more), or switch it off"
        )
    if device is Device.cpu:
        yield (
            "parallel.overlap_tensor_parallel=true needs a CUDA device, and runtime.device=cpu; switch it off, or use "
            "runtime.device=auto"
        )
    if config.precision.fp8 is Fp8Recipe.blockwise:
        yield (
            "parallel.overlap_tensor_parallel=true cannot send what precision.fp8=blockwise scales; switch it off, or "
            "use precision.fp8=tensorwise"
        )


def _pipeline_overlap_needs_interleaving(config: RunConfig) -> Violations:
    parallel = config.parallel
    if parallel.overlap_pipeline and parallel.virtual_pipeline_parallel == 1:
        yield (
            "parallel.overlap_pipeline=true works in the interleaved schedule alone; give "
            "parallel.virtual_pipeline_parallel of 2 or more, or switch it off"
        )


def _offloading_has_room_to_wait(config: RunConfig) -> Violations:
    parallel, layers = config.parallel, config.model.num_layers
    asked = f"parallel.offload_layers={parallel.offload_layers}"
    if not parallel.offload_layers:
        return
    if parallel.offload_layers >= layers:
        yield f"{asked} must be below model.num_layers={layers}: the last layers' activations are used at once"
    if parallel.pipeline_parallel > 1:
        yield (
            f"{asked} does not work with parallel.pipeline_parallel={parallel.pipeline_parallel}, whose microbatches "
            "overlap; use 1, or parallel.offload_layers=0 and parallel.recompute"
        )
    if parallel.recompute is not Recompute.none:
        yield (
            f"{asked} saves what parallel.recompute={parallel.recompute.value} recomputes; use "
            "parallel.recompute=none or parallel.offload_layers=0"
        )
    if config.runtime.device is Device.cpu:
        yield f"{asked} moves activations from a CUDA device to the host, and runtime.device=cpu; use 0"


def _fp8_fits_the_run(config: RunConfig) -> Violations:
    precision = config.precision
    if precision.fp8 is None:
        return
    asked = f"precision.fp8={precision.fp8.value}"
    if precision.dtype is not Dtype.bf16:
        yield f"{asked} needs precision.dtype=bf16, and it is {precision.dtype.value}; use bf16, or precision.fp8=null"
    if config.runtime.device is Device.cpu:
        yield f"{asked} needs a CUDA device, and runtime.device=cpu; use precision.fp8=null"
    for name, value in _fp8_dimensions(config):
        if value % precision.fp8.multiple:
            remedy = "change that, or use precision.fp8=null"
            yield f"{asked} needs multiples of {precision.fp8.multiple}, and {name} = {value}; {remedy}"


def _fp8_saves_inputs_anyway(config: RunConfig) -> Violations:
    fp8 = config.precision.fp8
    if fp8 is not None and config.parallel.recompute is Recompute.elementwise:
        yield (
            f"parallel.recompute=elementwise gains nothing with precision.fp8={fp8.value}, whose matmuls save 8-bit "
            "copies of their inputs; use parallel.recompute=none, selective or full"
        )


def _fp8_dimensions(config: RunConfig) -> Iterator[tuple[str, int]]:
    """Yield (description, size) for rows and columns of a layer's matmuls on one rank."""
    model, parallel = config.model, config.parallel
    degree = parallel.tensor_parallel
    split = f" / parallel.tensor_parallel={degree}" if degree > 1 else ""
    yield f"model.hidden_size={model.hidden_size}", model.hidden_size
    yield f"model.ffn_hidden_size={model.ffn_hidden_size}{split}", model.ffn_hidden_size // degree
    heads = f"model.num_attention_heads={model.num_attention_heads} * model.head_dim={model.head_dim}{split}"
    yield heads, model.query_width // degree
    keys = f"keys and values of model.num_key_value_heads={model.num_key_value_heads}"
    yield f"queries of {heads} with {keys}", (model.query_width + 2 * model.key_value_width) // degree
    twice = " * 2, noisy and clean" if config.stage.objective is Objective.joint else ""
    yield (
        (
            f"positions of a rank (train.micro_batch_size={config.train.micro_batch_size} * "
            f"data.sequence_length={config.data.sequence_length}{twice}, over context and sequence parallel ranks)"
        ),
        config.positions_per_forward // (degree if parallel.sequence_parallel else 1),
    )


LEVER_RULES: list[Callable[[RunConfig], Violations]] = [
    _parameter_overlap_needs_gradient_overlap,
    _tensor_overlap_splits_the_sequence,
    _pipeline_overlap_needs_interleaving,
    _offloading_has_room_to_wait,
    _fp8_fits_the_run,
    _fp8_saves_inputs_anyway,
]

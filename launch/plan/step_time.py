"""Predicted seconds of an optimizer step: a sum of named parts, each simple enough to be checked by hand.

    compute        useful FLOPs / (GPUs * peak * mfu)
    recomputation  the forward again: of the layers (full) or of attention (selective), at the same speed; elementwise:
                   what is read and written for it at the memory's bandwidth
    imbalance      what the busiest pipeline stage computes beyond the mean (the head, on the last)
    tensor         every tensor-parallel collective, none of it overlapped
    context        clean keys and values gathered over context-parallel ranks, none of it overlapped
    pipeline       sends of a stage, none of them overlapped
    bubble         (P - 1) / (V * microbatches) of the above: waiting while the pipeline fills and drains
    data           reduction of gradients beyond the last microbatch's backward, gathering of weights beyond the first
                   one's forward, where these overlap; else both in full

Left out: the optimizer's own arithmetic, data loading, checkpoints, evaluation, that small products are slower, and
that context-parallel ranks see unequal numbers of pairs where documents are packed (tests/bench/joint/balance.py).
"""

from dataclasses import dataclass, fields

from conf.schema import Recompute
from launch.plan.activations import ffn_bytes, norm_outputs_made_again
from launch.plan.communication import Traffic
from launch.plan.hardware import Hardware
from launch.plan.shape import Shape
from launch.plan.work import StepWork

BACKWARD_SHARE, FORWARD_SHARE = 2 / 3, 1 / 3


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part (see the module)."""

    compute: float
    recomputation: float
    imbalance: float
    tensor: float
    context: float
    pipeline: float
    bubble: float
    data: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_step_time(shape: Shape, work: StepWork, traffic: list[Traffic], hardware: Hardware) -> StepTime:
    """One step of the global batch on all GPUs. traffic: all of a GPU's in a step."""
    parallel = shape.parallel
    stages, virtual = parallel.pipeline_parallel, parallel.virtual_pipeline_parallel
    speed = parallel.model_parallel * shape.data_parallel * hardware.peak_flops * hardware.mfu
    compute = work.total_flops / speed
    recomputation = _recomputed_flops(shape, work) / speed + _elementwise_bytes(shape) / hardware.memory_bandwidth
    imbalance = _flops_of_last_stage(work, stages) * stages / speed - compute
    tensor, context, pipeline = (
        _sending_seconds(traffic, group, hardware) for group in ("tensor", "context", "pipeline")
    )
    busy = compute + recomputation + imbalance + tensor + context + pipeline
    one_microbatch = (compute + imbalance) / shape.num_microbatches
    return StepTime(
        compute=compute,
        recomputation=recomputation,
        imbalance=imbalance,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        bubble=busy * (stages - 1) / (virtual * shape.num_microbatches),
        data=_exposed_data_seconds(shape, traffic, hardware, one_microbatch),
    )


def _sending_seconds(traffic: list[Traffic], group: str, hardware: Hardware) -> float:
    return sum(item.sent_bytes / hardware.bandwidth(item.span) for item in traffic if item.group == group)


def _recomputed_flops(shape: Shape, work: StepWork) -> float:
    flops = work.flops
    if shape.parallel.recompute is Recompute.full:
        return (flops.layers + flops.attention) * FORWARD_SHARE
    if shape.parallel.recompute is Recompute.selective:
        return flops.attention * FORWARD_SHARE
    return 0.0


def _elementwise_bytes(shape: Shape) -> int:
    """Of a rank's step: gate and up are read and their product is written; every norm reads its input and writes."""
    if shape.parallel.recompute is not Recompute.elementwise:
        return 0
    layers = shape.model.num_layers // shape.parallel.pipeline_parallel
    return shape.num_microbatches * layers * (3 * ffn_bytes(shape) + 2 * norm_outputs_made_again(shape))


def _flops_of_last_stage(work: StepWork, stages: int) -> float:
    return (work.flops.layers + work.flops.attention) / stages + work.flops.head


def _exposed_data_seconds(shape: Shape, traffic: list[Traffic], hardware: Hardware, one_microbatch: float) -> float:
    overlaps = {
        "reduce-scatter": BACKWARD_SHARE if shape.parallel.overlap_grad_reduce else 0.0,
        "all-gather": FORWARD_SHARE if shape.parallel.overlap_param_gather else 0.0,
    }
    exposed = 0.0
    for item in traffic:
        if item.group == "data":
            seconds = item.sent_bytes / hardware.bandwidth(item.span)
            exposed += max(0.0, seconds - overlaps[item.operation] * one_microbatch)
    return exposed

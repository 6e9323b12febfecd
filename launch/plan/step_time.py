"""Predict the seconds of an optimizer step as a sum of named parts, each simple enough to check by hand.

    compute        computed FLOPs / (GPUs * peak * mfu)
    recomputation  a second forward of the layers (full) or of attention (selective) at the same speed; elementwise: its
                   reads and writes at the memory's bandwidth
    imbalance      what the busiest pipeline stage computes beyond the mean (the last one has the head, the first one
                   the vision tower)
    tensor         every tensor-parallel collective, not overlapped
    context        gathering clean keys and values over context-parallel ranks, not overlapped
    pipeline       sends of a pipeline stage, not overlapped
    bubble         (P - 1) / (V * microbatches) of the above: waiting while the pipeline fills and drains
    data           reduction of gradients beyond the last microbatch's backward, and gathering of weights beyond the
                   first one's forward, where these overlap; otherwise both in full

Left out: the optimizer's own arithmetic, data loading, checkpoints, evaluation, the lower speed of small matmuls, and
the unequal numbers of attended pairs of context-parallel ranks with packed documents (tests/bench/joint/balance.py).
"""

from dataclasses import dataclass, fields

from conf.schema import Recompute, VisionPrecision
from launch.plan.activations import ffn_bytes, recomputed_norm_outputs
from launch.plan.communication import Traffic
from launch.plan.hardware_profile import HardwareProfile
from launch.plan.rank_shape import RankShape
from launch.plan.step_work import StepWork
from pretrain.costs import StepFlops

BACKWARD_SHARE, FORWARD_SHARE = 2 / 3, 1 / 3
# Of the dense bf16 peak, on an H100 (vendor data sheet).
SPEED_OF_FORMATS = {VisionPrecision.fp32: 67 / 989, VisionPrecision.tf32: 495 / 989, VisionPrecision.bf16: 1.0}


@dataclass(frozen=True)
class StepTime:
    """Holds the seconds of one step by part (see the module)."""

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
        """Seconds of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_step_time(shape: RankShape, work: StepWork, traffic: list[Traffic], hardware: HardwareProfile) -> StepTime:
    """Predict one step of the global batch on all GPUs. traffic: everything one GPU sends per step."""
    parallel = shape.parallel
    num_stages, virtual = parallel.pipeline_parallel, parallel.virtual_pipeline_parallel
    speed = parallel.model_parallel * shape.data_parallel * hardware.peak_flops * hardware.mfu
    flops = _slow_down_vision(work.computed_flops, shape.vision)
    compute = sum(flops) / speed
    recomputation = (
        count_recomputed_flops(parallel.recompute, flops) + flops.vision * FORWARD_SHARE
    ) / speed + _elementwise_bytes(shape) / hardware.memory_bandwidth
    imbalance = _flops_of_busiest_pipeline_stage(flops, num_stages) * num_stages / speed - compute
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
        bubble=busy * (num_stages - 1) / (virtual * shape.num_microbatches),
        data=_exposed_data_seconds(shape, traffic, hardware, one_microbatch),
    )


def _sending_seconds(traffic: list[Traffic], group: str, hardware: HardwareProfile) -> float:
    return sum(item.sent_bytes / hardware.bandwidth(item.span) for item in traffic if item.group == group)


def count_recomputed_flops(recompute: Recompute, flops: StepFlops) -> float:
    """Return what the backward pass computes again, of a step's FLOPs."""
    if recompute is Recompute.full:
        return (flops.layers + flops.attention) * FORWARD_SHARE
    if recompute is Recompute.selective:
        return flops.attention * FORWARD_SHARE
    return 0.0


def _elementwise_bytes(shape: RankShape) -> int:
    """Count bytes of a rank's step: gate and up are read, SwiGLU's output is written, norms read and write."""
    if shape.parallel.recompute is not Recompute.elementwise:
        return 0
    layers = shape.model.num_layers // shape.parallel.pipeline_parallel
    return shape.num_microbatches * layers * (3 * ffn_bytes(shape) + 2 * recomputed_norm_outputs(shape))


def _slow_down_vision(flops: StepFlops, precision: VisionPrecision) -> StepFlops:
    """Return the FLOPs with those of the vision tower as many as would take its time in bf16."""
    return flops._replace(vision=round(flops.vision / SPEED_OF_FORMATS[precision]))


def _flops_of_busiest_pipeline_stage(flops: StepFlops, num_stages: int) -> float:
    layers = (flops.layers + flops.attention) / num_stages
    return layers + (flops.head + flops.vision if num_stages == 1 else max(flops.head, flops.vision))


def _exposed_data_seconds(
    shape: RankShape, traffic: list[Traffic], hardware: HardwareProfile, one_microbatch: float
) -> float:
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

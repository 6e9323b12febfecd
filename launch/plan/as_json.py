"""Describe plans by plain values for programs: bytes, seconds, FLOPs."""

from dataclasses import asdict, fields
from typing import Any

from launch.plan.layout_plan import LayoutPlan, list_overrides
from launch.plan.search import Search


def describe_plan(plan: LayoutPlan) -> dict[str, Any]:
    """Describe one plan."""
    return {
        **describe_layout(plan),
        "gpus": plan.num_gpus,
        "parameters": plan.parameters,
        "steps": plan.config.num_steps,
        "memory": [asdict(stage) | {"total": stage.total} for stage in plan.memory],
        "usable_bytes": plan.hardware.usable_bytes,
        "flops_per_token": plan.work.flops_per_token,
        "flops_per_token_ar": plan.ar_work.flops_per_token,
        "step": {**asdict(plan.work), "flops": plan.work.flops._asdict()},
        "seconds": {field.name: getattr(plan.time, field.name) for field in fields(plan.time)},
        "step_seconds_at_stated_mfu": plan.time.compute,
        "days_at_stated_mfu": plan.days_at_stated_mfu,
        "communication": [
            asdict(item) | {"message_bytes": item.message_bytes, "sent_bytes": item.sent_bytes} for item in plan.traffic
        ],
        "checkpoint_bytes": plan.checkpoint_bytes,
        "save_seconds": plan.save_seconds,
        "hardware": asdict(plan.hardware),
    }


def describe_layout(plan: LayoutPlan) -> dict[str, Any]:
    """Describe what a search compares: the layout, whether it fits, and how fast it is."""
    parallel = plan.config.parallel
    return {
        "layout": parallel.describe(plan.num_gpus),
        "overrides": list_overrides(plan.config),
        "fits": plan.fits,
        "not_modelled": plan.not_modelled,
        "memory_bytes": plan.fullest.total,
        "step_seconds": plan.time.total,
        "days": plan.days,
        "mfu": plan.mfu,
    }


def describe_search(search: Search, top: int) -> dict[str, Any]:
    """Describe the best layouts, or the smallest one if none fits."""
    smallest = search.smallest
    return {
        "tried": search.tried,
        "refused": search.refused,
        "feasible": len(search.feasible),
        "layouts": [describe_layout(plan) for plan in search.feasible[:top]],
        "nearest": describe_layout(smallest) if smallest is not None and not search.feasible else None,
    }

"""Rules of optimizer and schedule, which a run and a drafter share."""

from conf.rules.violations import Violations
from conf.schema import DecayShape, RunConfig, ScheduleKind
from conf.schema.drafter import DrafterConfig


def learning_rate_falls(config: RunConfig | DrafterConfig) -> Violations:
    """Refuse a schedule that rises after warm-up, cannot reach its end, or is longer than the run."""
    schedule = config.schedule
    if schedule.final_lr > schedule.peak_lr:
        yield (
            f"schedule.final_lr={schedule.final_lr:g} is above schedule.peak_lr={schedule.peak_lr:g}; "
            "the rate falls after warm-up, so set both"
        )
    if schedule.decay_shape is DecayShape.exponential and schedule.final_lr == 0:
        yield "schedule.decay_shape=exponential never reaches schedule.final_lr=0; give a positive final_lr"
    phases = schedule.warmup_fraction + schedule.decay_fraction
    if schedule.kind is ScheduleKind.wsd and phases > 1:
        yield (
            f"schedule.warmup_fraction={schedule.warmup_fraction:g} + schedule.decay_fraction="
            f"{schedule.decay_fraction:g} exceed 1, the whole run; shorten one"
        )

"""The learning rate is a pure function of the tokens seen: nothing to save, and a changed budget holds at once."""

import math

from conf.schema import DecayShape, ScheduleConfig, ScheduleKind


def compute_learning_rate(schedule: ScheduleConfig, progress: float) -> float:
    """Return the learning rate of the step that ends at `progress` (share of the token budget, 0 to 1).

    Linear warm-up to peak_lr, then the schedule's course to final_lr. WSD: arXiv 2404.06395.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < schedule.warmup_fraction:
        return schedule.peak_lr * progress / schedule.warmup_fraction
    start = schedule.warmup_fraction
    if schedule.kind is ScheduleKind.wsd:
        start = 1 - schedule.decay_fraction
    if progress <= start:
        return schedule.peak_lr
    return _decay((progress - start) / (1 - start), schedule)


def _decay(share: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate after a share (0 to 1) of the decay."""
    peak, final = schedule.peak_lr, schedule.final_lr
    shape = DecayShape.cosine if schedule.kind is ScheduleKind.cosine else schedule.decay_shape
    if shape is DecayShape.exponential:
        return peak * (final / peak) ** share
    remaining = {
        DecayShape.linear: 1 - share,
        DecayShape.minus_sqrt: 1 - math.sqrt(share),
        DecayShape.cosine: (1 + math.cos(math.pi * share)) / 2,
    }[shape]
    return final + (peak - final) * remaining

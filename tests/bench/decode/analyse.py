"""Computes the reported figures from runs on prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from model.evaluate.statistics import bootstrap
from tests.bench.decode.cost import Cost, compute_speedup, find_winners
from tests.bench.decode.settings import Setting
from tests.bench.decode.trained import Run, add_up

WANTED_GAIN = 1.3  # quadratic's tokens per forward over linear's
RESAMPLES, RESAMPLING_SEED = 2000, 0


def analyse(runs: Sequence[Sequence[Run]], cost: Cost) -> dict[str, Any]:
    """Compute all figures. runs: by prompt, each in the same order of settings."""
    settings = [run.setting for run in runs[0]]
    by_setting = dict(zip(settings, zip(*runs, strict=True), strict=True))
    figures = {setting: add_up(of_all) for setting, of_all in by_setting.items()}
    lossless = {setting.name: figures[setting] for setting in settings if setting.mode != "block_diffusion"}
    for setting in settings:
        figures[setting]["speedup_here"] = compute_speedup(figures[setting], cost.ratio)
    with_adapter = [False, True][: 1 + any(setting.with_adapter for setting in settings)]
    gains = {
        Setting("quadratic", on).family: compute_gain(
            by_setting[Setting("quadratic", on)], by_setting[Setting("linear", on)]
        )
        for on in with_adapter
    }
    agreements = [run.agreement for of_prompt in runs for run in of_prompt if run.setting.mode != "block_diffusion"]
    return {
        "num_prompts": len(runs),
        "by_setting": {setting.name: asdict(setting) | figures[setting] for setting in settings},
        "quadratic_over_linear": gains,
        "agreement": {kind: agreements.count(kind) for kind in ("equal", "tie", "different")},
        "cost": asdict(cost) | {"ratio": cost.ratio},
        "winners": [{"from_ratio": ratio, "name": name} for ratio, name in find_winners(lossless)],
    }


def compute_gain(quadratic: Sequence[Run], linear: Sequence[Run]) -> dict[str, Any]:
    """Return the ratio of tokens per forward, and its 95% interval over prompts (None for a single one)."""
    counts = np.array(
        [
            (ours.num_tokens, ours.num_forwards, other.num_tokens, other.num_forwards)
            for ours, other in zip(quadratic, linear, strict=True)
        ]
    )
    return {
        "ratio": float(_divide_rates(counts.sum(0))),
        "interval": bootstrap(counts, _divide_rates, RESAMPLES, RESAMPLING_SEED),
    }


def _divide_rates(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])


def pick(by_setting: Mapping[str, Mapping[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Return the figures of the settings that have the wanted values, with their names."""
    return [
        {"name": name, **values}
        for name, values in by_setting.items()
        if all(values[key] == value for key, value in wanted.items())
    ]

"""Compare measured adapters: gains over none and over the first of them, with intervals over the same prompts."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from lora.evaluate.gain import bootstrap_gain, compute_gain_percent
from model.evaluate.statistics import bootstrap, divide_sums
from pretrain.run.metrics import load_metrics
from tests.bench.drafter.measure import SPECULATION, WITHOUT, output_path
from tests.bench.drafter.variants import Variant
from tests.bench.medium import BenchModel

RESAMPLES, SEED = 4000, 0


def compare(model: BenchModel, variants: Sequence[Variant]) -> dict[str, Any]:
    """Return the figures of every variant by its name, and of decoding without an adapter."""
    without = _read(model, None)
    first = _read(model, variants[0])
    results: dict[str, Any] = {WITHOUT: {mode: _describe(without, mode) for mode in SPECULATION}}
    for variant in variants:
        measured = _read(model, variant)
        results[variant.name] = {
            **{
                mode: _describe(measured, mode)
                | {
                    "gain_over_none": _compute_gain(without, measured, mode),
                    "gain_over_first": None if variant is variants[0] else _compute_gain(first, measured, mode),
                }
                for mode in SPECULATION
            },
            **_describe_training(model, variant),
            "num_different": measured["num_different"],
        }
    return results | {"distinct_4grams": without["distinct_4grams"]}


def _read(model: BenchModel, variant: Variant | None) -> dict[str, Any]:
    return json.loads(output_path(model, variant).read_text(encoding="utf-8"))


def _describe(measured: dict[str, Any], mode: str) -> dict[str, Any]:
    figures = {}
    for name, key in (("tokens_per_forward", "tokens_and_forwards"), ("acceptance_length", "tokens_and_cycles")):
        counts = np.array(measured["modes"][mode][key])
        interval = bootstrap(counts, divide_sums, RESAMPLES, SEED)
        figures[name] = {"value": float(divide_sums(counts.sum(0))), "interval": interval}
    return figures


def _compute_gain(before: dict[str, Any], after: dict[str, Any], mode: str) -> dict[str, Any]:
    """Return the gain of tokens per forward in percent; both were measured on the same prompts."""
    counts = [np.array(values["modes"][mode]["tokens_and_forwards"]) for values in (before, after)]
    value = float(compute_gain_percent(counts[0].sum(0), counts[1].sum(0)))
    return {"value": value, "interval": bootstrap_gain(counts[0], counts[1], RESAMPLES, SEED)}


def _describe_training(model: BenchModel, variant: Variant) -> dict[str, Any]:
    """Return steps, their seconds, and acceptance on held-out responses before and after."""
    train, heldout = (load_metrics(variant.folder(model), kind) for kind in ("train", "heldout"))
    return {
        "steps": heldout[-1]["step"],
        "train_seconds": sum(line["step_seconds"] for line in train),
        "heldout_acceptance_length": [heldout[0]["acceptance_length"], heldout[-1]["acceptance_length"]],
    }


def build_table(title: str, results: dict[str, Any]) -> Table:
    """Return one line per variant, the best of linear speculation first."""
    table = Table("", title=f"{title}; gains of tokens per forward in %, with 95% intervals", box=None)
    for mode in SPECULATION:
        for column in ("tokens/forward", "gain", "over the first", "acceptance length"):
            table.add_column(f"{mode.removesuffix('_speculation')}: {column}", justify="right")
    table.add_column("held-out", justify="right")
    table.add_column("steps, seconds", justify="right")
    named = [(name, values) for name, values in results.items() if isinstance(values, dict)]
    for name, values in sorted(named, key=lambda item: -item[1][SPECULATION[0]]["tokens_per_forward"]["value"]):
        cells = [text for mode in SPECULATION for text in _write_mode(values[mode])]
        heldout = " -> ".join(f"{value:.2f}" for value in values.get("heldout_acceptance_length", ()))
        training = f"{values['steps']}, {values['train_seconds']:.0f}" if "steps" in values else ""
        table.add_row(name, *cells, heldout, training)
    return table


def _write_mode(figures: dict[str, Any]) -> list[str]:
    gains = [figures.get(key) for key in ("gain_over_none", "gain_over_first")]
    return [
        f"{figures['tokens_per_forward']['value']:.3f}",
        *("" if gain is None else _write(gain, "+.1f") for gain in gains),
        _write(figures["acceptance_length"], ".2f"),
    ]


def _write(figure: dict[str, Any], form: str) -> str:
    interval = figure["interval"]
    return f"{figure['value']:{form}}" + ("" if interval is None else f" ({interval[0]:{form}}..{interval[1]:{form}})")

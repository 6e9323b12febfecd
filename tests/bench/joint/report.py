"""Tables of the joint benchmark, every figure next to the bound that it should meet."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.joint.cases import CASES

WANTED_SHARE, WANTED_LAYERS, WANTED_HEAD = 0.9, 2.15, 1.6
WANTED_MEMORY = dict(zip((case.name for case in CASES), (0.43, 0.2, 0.3), strict=True))


def print_results(results: dict[str, Any], output: Path) -> None:
    """Print all tables, and where the numbers are."""
    console = Console(width=118)
    tables = (_speed(results["cases"]), _parts(results["cases"]), _memory(results["cases"]), _growth(results))
    for table in (*tables, _attention(results["attention"]), _economies(results["economies"]), _profile(results)):
        console.print(table)
        console.print()
    console.print(f"[dim]{output}[/dim]")


def _speed(cases: dict[str, Any]) -> Table:
    title = "joint step against the straightforward formulation (CPU time, medians in turns)"
    table = Table(
        "case",
        "speed-up",
        "floor allows",
        "share of floor",
        "wanted",
        "of what is needed",
        "seconds",
        "spread",
        title=title,
    )
    for name, case in cases.items():
        speed, times = case["speed"], case["speed"]["seconds"]
        table.add_row(
            name,
            f"{speed['speedup']:.2f}x",
            f"{speed['speedup_allowed_by_floor']:.2f}x",
            f"{speed['share_of_floor']:.1%}",
            f">= {WANTED_SHARE:.0%}",
            f"{speed['share_of_needed']:.1%}",
            f"{times['reference']:.2f} -> {times['ours']:.2f}",
            f"{max(speed['spread'].values()):.1%}",
        )
    return table


def _parts(cases: dict[str, Any]) -> Table:
    table = Table("case", "layers", "wanted", "head and loss", "wanted", "spread", title="joint step over our AR step")
    for name, case in cases.items():
        parts = case["parts"]
        table.add_row(
            name,
            f"{parts['layers_over_ar']:.2f}x",
            f"<= {WANTED_LAYERS}x",
            f"{parts['head_over_ar']:.2f}x",
            f"<= {WANTED_HEAD}x",
            f"{max(parts['spread'].values()):.1%}",
        )
    return table


def _memory(cases: dict[str, Any]) -> Table:
    columns = ("case", "rows of the head at a time", "reference", "ours", "ratio", "wanted", "live tensors")
    table = Table(*columns, title="peak memory of the step")
    for name, case in cases.items():
        memory = case["memory"]
        wanted = WANTED_MEMORY.get(name)
        table.add_row(
            name,
            str(case["loss_chunk_rows"]),
            _megabytes(memory["reference"]["resident"]),
            _megabytes(memory["ours"]["resident"]),
            f"{memory['ratio']['resident']:.3f}",
            "" if wanted is None else f"<= {wanted}",
            f"{memory['ratio']['live']:.3f}",
        )
    return table


def _growth(results: dict[str, Any]) -> Table:
    growth = results["memory_by_length"]
    columns = ("L", "full recomputation", "launch.plan", "head and loss alone", "whole logits would be")
    table = Table(*columns, title="memory by sequence length")
    columns = zip(
        *(growth[key] for key in ("bytes", "predicted_bytes", "head_bytes", "whole_logits_bytes")), strict=True
    )
    for length, values in zip(growth["lengths"], columns, strict=True):
        table.add_row(str(length), *map(_megabytes, values))
    slope, predicted = growth["bytes_per_token"], growth["predicted_bytes_per_token"]
    table.caption = f"{slope / 1e3:.2f} kB per token measured, {predicted / 1e3:.2f} kB predicted"
    return table


def _attention(attention: dict[str, Any]) -> Table:
    lengths = list(attention)
    table = Table("way", *(f"L {length}" for length in lengths), title="one layer's attention, ms")
    for name in attention[lengths[0]]:
        table.add_row(name, *(f"{attention[length][name] * 1e3:.1f}" for length in lengths))
    return table


def _economies(economies: dict[str, Any]) -> Table:
    title = "work without an effect that is left out, share of the useful FLOPs"
    table = Table("case", "last layer's positions without loss", "noisy blocks without a masked token", title=title)
    for name, shares in economies.items():
        table.add_row(name, f"{shares['last_layer_positions']:.1%}", f"{shares['empty_blocks']:.1%}")
    return table


def _profile(results: dict[str, Any]) -> Table:
    table = Table("operator", "share of CPU time", title="our joint step, first case")
    for name, share in results["profile"].items():
        table.add_row(name, f"{share:.1%}")
    return table


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"

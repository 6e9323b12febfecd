"""Benchmarks of the data pipeline: `make bench-data` prints them and writes runs/bench/data.json."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from conf.system.atomic import atomic_write_text
from tests.bench.data.loader import measure_loader
from tests.bench.data.memory import measure_memory
from tests.bench.data.tokenization import measure_tokenization

OUTPUT = Path("runs/bench/data.json")
LARGEST_LOADER_SHARE, SMALLEST_RATIO, LARGEST_GROWTH = 0.02, 0.9, 1.1


def main() -> None:
    """Measure, print, write."""
    results = measure_tokenization() | measure_loader() | measure_memory()
    atomic_write_text(OUTPUT, json.dumps(results, indent=2) + "\n")
    print_results(results)


def print_results(results: dict[str, Any]) -> None:
    """Print each figure next to the bound it must keep."""
    table = Table("figure", "measured", "wanted", title="data pipeline")
    peaks = results["peak_rss_bytes_by_corpus_size"]
    largest, smallest = max(peaks, key=int), min(peaks, key=int)
    rates = results["loader_tokens_per_second_by_kind"]
    table.add_row(
        "tokenisation, throughput / raw encode_batch", f"{results['tokenize_vs_raw']:.2f}", f">= {SMALLEST_RATIO}"
    )
    table.add_row(
        "loader, share of a toy step", f"{results['loader_share_of_toy_step']:.2%}", f"< {LARGEST_LOADER_SHARE:.0%}"
    )
    for kind, rate in rates.items():
        table.add_row(f"loader, tokens/s of packed {kind}", f"{rate / 1e6:.1f}M", "")
    growth = peaks[largest] / peaks[smallest]
    size = int(largest) / int(smallest)
    table.add_row(f"peak memory, corpus {size:.0f}x larger", f"{growth:.2f}x", f"<= {LARGEST_GROWTH}x")
    console = Console(width=80)
    console.print(table)
    console.print(f"[dim]{OUTPUT}[/dim]")


if __name__ == "__main__":
    main()

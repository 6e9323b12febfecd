"""The printed summary shows every mode, every stage, every check, and where things are."""

import io

from rich.console import Console

from conf.schema import RunConfig
from conf.schema.drafter import DrafterConfig
from launch.quickstart.folder import QuickstartFolder
from launch.quickstart.loss_curves import load_curves
from launch.quickstart.summary import build_summary
from launch.quickstart.summary_table import build_mode_table, print_summary


def test_what_is_printed_is_what_the_summary_holds(
    finished_folder: QuickstartFolder, configs: dict[str, RunConfig], drafter: DrafterConfig
) -> None:
    stages = [load_curves(stage, finished_folder.run(stage)) for stage in configs]
    summary = build_summary(finished_folder, stages, configs, drafter, {"data": 2.0})
    summary["checks"][2]["passed"] = False
    console = Console(width=140, record=True, file=io.StringIO())
    print_summary(console, summary, finished_folder)
    text = console.export_text()
    for expected in (
        "AR",
        "diffusion",
        "linear",
        "quadratic",
        "+ adapter",
        "1.93",
        "2.21",
        "acceptance length 1.90 -> 2.30",
        "TP2 PP1 DP1",
        "TP1 PP2 DP1",
        "TP1 PP1 DP2",
        "4.100",
        "It responds.",
    ):
        assert expected in text
    assert (text.count("ok  "), text.count("FAIL")) == (7, 1)
    assert str(finished_folder.adapter) in text


def test_the_table_fits_a_terminal_of_80_columns(
    finished_folder: QuickstartFolder, configs: dict[str, RunConfig], drafter: DrafterConfig
) -> None:
    stages = [load_curves(stage, finished_folder.run(stage)) for stage in configs]
    table = build_mode_table(build_summary(finished_folder, stages, configs, drafter, {}))
    assert Console(width=200).measure(table).maximum <= 80

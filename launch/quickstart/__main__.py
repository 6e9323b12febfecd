"""The whole product in a few minutes on two CPU cores: `python -m launch.quickstart` (or `make quickstart`)."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from conf.composition.compose import compose_drafter_config, compose_run_config
from conf.rules.drafter import check_drafter_rules
from conf.schema import RunConfig
from conf.schema.drafter import DrafterConfig
from conf.system.atomic import atomic_write_text
from conf.system.entry import exit_status
from conf.system.errors import UserError
from launch.quickstart.answers import write_answers
from launch.quickstart.curves import load_curves
from launch.quickstart.folder import QuickstartFolder, load_json, remove
from launch.quickstart.overrides import DRAFTER_PREFIX, Overrides, split_overrides
from launch.quickstart.phases import Phase, run_phases
from launch.quickstart.plot import draw_curves
from launch.quickstart.processes import (
    NUM_PROCESSES,
    decode_command,
    drafter_command,
    export_command,
    run_process,
    train_command,
)
from launch.quickstart.quiet import quiet_libraries
from launch.quickstart.report import print_report
from launch.quickstart.summary import build_summary, save_summary

STAGES = ("ar", "joint", "sft")
EXIT_CHECK_FAILED = 1


def main() -> None:
    """Parse the command line; exit status 1 if a check fails, 2 with one message if something cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.quickstart",
        description="Text, toy checkpoint, AR stage, joint stage, export, draft adapter, decoding in three modes, "
        "instruct tuning, answers, one report. "
        "A second call continues where the first one stopped.",
    )
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of runs (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier quickstart and start over")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="configuration overrides for all stages, such as train.tokens=1e5; those of the draft adapter begin with "
        f"{DRAFTER_PREFIX}, such as {DRAFTER_PREFIX}train.steps=10",
    )
    arguments = parser.parse_args()
    quiet_libraries()
    sys.exit(
        exit_status(
            lambda: 0 if run_quickstart(arguments.root, arguments.fresh, arguments.overrides) else EXIT_CHECK_FAILED,
            interrupted="interrupted: the same command continues from here",
        )
    )


def run_quickstart(root: Path, fresh: bool, overrides: list[str]) -> bool:
    """Runs what is not done yet and reports; returns whether every check passed. Raises UserError."""
    folder = QuickstartFolder(root)
    console = Console(highlight=False)
    split = split_overrides(overrides)
    configs = {
        stage: compose_run_config([f"experiment=quickstart_{stage}", f"run.root={root}", *split.stages])
        for stage in STAGES
    }
    drafter = compose_drafter(root, split.drafter)
    if fresh:
        remove(folder.path)
    keep_request(folder, overrides)
    seconds = run_phases(
        build_phases(folder, configs, split),
        folder.phases,
        say=lambda text: console.print(text, markup=False, soft_wrap=True),
    )
    curves = [load_curves(stage, folder.run(stage)) for stage in STAGES]
    draw_curves(curves, load_json(folder.unigram)["unigram_entropy"], folder.curves)
    summary = build_summary(folder, curves, configs, drafter, seconds)
    save_summary(folder, summary)
    print_report(console, summary, folder)
    return all(check["passed"] for check in summary["checks"])


def compose_drafter(root: Path, overrides: list[str]) -> DrafterConfig:
    """Raises UserError now rather than after the minutes that come before the drafter."""
    try:
        config = compose_drafter_config(["experiment=quickstart", f"run.root={root}", *overrides])
        check_drafter_rules(config, NUM_PROCESSES)
    except UserError as error:
        raise UserError(f"overrides of the draft adapter ({DRAFTER_PREFIX}...): {error}") from error
    return config


def keep_request(folder: QuickstartFolder, overrides: list[str]) -> None:
    """Finished phases belong to the overrides they ran with. Raises UserError if this call gives others."""
    if not folder.request.exists():
        atomic_write_text(folder.request, json.dumps({"overrides": overrides}) + "\n")
        return
    before = load_json(folder.request).get("overrides")
    if before != overrides:
        raise UserError(
            f"{folder.path} was begun with the overrides {before}, not {overrides}: give the same ones to continue, "
            "or --fresh to start over."
        )


def build_phases(folder: QuickstartFolder, configs: dict[str, RunConfig], overrides: Overrides) -> list[Phase]:
    """From text to answers, in order. configs: by stage."""
    config = configs["ar"]
    return [
        Phase(
            "data",
            "text and docstring chats of Python's standard library: tokenizer, training and held-out tokens",
            [folder.tokenizer, folder.train_data.parent],
            lambda: _prepare_data(config, configs["sft"], folder),
        ),
        Phase(
            "start_checkpoint",
            "toy Ministral 3 checkpoint in the released format",
            [folder.start],
            lambda: _write_start_checkpoint(config, folder),
        ),
        *(_training_phase(stage, folder, overrides.stages) for stage in ("ar", "joint")),
        Phase(
            "export",
            "export to a Hugging Face directory",
            [folder.export],
            lambda: run_process("the export", export_command(folder.run("joint"), folder.export)),
        ),
        Phase(
            "drafter",
            "draft adapter of the export, data parallelism 2",
            [folder.run("drafter"), folder.adapter],
            lambda: run_process("the drafter's training", drafter_command(folder.root, overrides.drafter)),
            keeps_partial_outputs=True,
        ),
        Phase(
            "decode",
            "reload the export in a process of its own and decode in three modes, one of them with the adapter too",
            [folder.decoding],
            lambda: run_process("decoding", decode_command(folder.export, folder.heldout_data, folder.decoding)),
        ),
        _training_phase("sft", folder, overrides.stages),
        Phase(
            "export_instruct",
            "export of the instruct checkpoint",
            [folder.instruct],
            lambda: run_process("the export", export_command(folder.run("sft"), folder.instruct)),
        ),
        Phase(
            "answers",
            "answers to held-out questions, in three modes",
            [folder.answers],
            lambda: write_answers(folder),
        ),
    ]


def _training_phase(stage: str, folder: QuickstartFolder, overrides: list[str]) -> Phase:
    layout = {
        "ar": "tensor parallelism 2",
        "joint": "pipeline parallelism 2, from the AR weights",
        "sft": "data parallelism 2, from the joint weights",
    }[stage]
    command = train_command(f"quickstart_{stage}", folder.root, overrides)
    return Phase(
        stage,
        f"{stage} stage, {layout}",
        [folder.run(stage)],
        lambda: run_process(f"the {stage} stage", command),
        keeps_partial_outputs=True,
    )


def _prepare_data(config: RunConfig, chats: RunConfig, folder: QuickstartFolder) -> None:
    from launch.quickstart.data import prepare_data  # imports megatron-core and tokenizers

    prepare_data(config, chats.data, folder)


def _write_start_checkpoint(config: RunConfig, folder: QuickstartFolder) -> None:
    from launch.quickstart.start_checkpoint import write_start_checkpoint  # imports torch and transformers

    write_start_checkpoint(config.model, folder.tokenizer, folder.start, config.train.seed)


if __name__ == "__main__":
    main()

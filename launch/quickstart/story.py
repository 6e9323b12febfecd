"""Tell the whole story in order: from text to a tri-mode checkpoint with a draft adapter, and to an instruct model.

`run_quickstart` is everything that `make quickstart` does. `build_phases` lists its phases; those that train, export,
decode or chat are the commands a user would type, each a process of its own.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from conf.composition.compose import compose_drafter_config, compose_run_config
from conf.rules.drafter import check_drafter_rules
from conf.schema import RunConfig
from conf.schema.drafter import DrafterConfig
from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from launch.quickstart.folder import QuickstartFolder, load_json, remove
from launch.quickstart.loss_curves import draw_curves, load_curves
from launch.quickstart.phases import (
    NUM_PROCESSES,
    Phase,
    module_command,
    read_output,
    run_phases,
    two_process_command,
)
from launch.quickstart.summary import build_summary, save_summary
from launch.quickstart.summary_table import print_summary
from model.hf.options import AR, BLOCK_DIFFUSION, LINEAR, QUADRATIC

STAGES = ("ar", "joint", "sft")
DRAFTER_PREFIX = "drafter."
CHAT_MODES = (AR, BLOCK_DIFFUSION, LINEAR, QUADRATIC)  # each responds to one held-out question
MAX_RESPONSE_TOKENS = 96


def run_quickstart(root: Path, fresh: bool, overrides: list[str]) -> bool:
    """Run the phases that are not done yet, then draw the losses, write the summary and print it.

    Returns:
        Whether every check of the summary passed.

    Raises:
        UserError: An override is wrong, the folder was begun with others, or a phase failed.
    """
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
    record_request(folder, overrides)

    seconds = run_phases(
        build_phases(folder, configs, split),
        folder.phases,
        show=lambda text: console.print(text, markup=False, soft_wrap=True),
    )

    curves = [load_curves(stage, folder.run(stage)) for stage in STAGES]
    draw_curves(curves, load_json(folder.unigram)["unigram_entropy"], folder.curves)
    summary = build_summary(folder, curves, configs, drafter, seconds)
    save_summary(folder, summary)
    print_summary(console, summary, folder)
    return all(check["passed"] for check in summary["checks"])


@dataclass(frozen=True)
class Overrides:
    """Separate the overrides of the training stages (pretrain.train) from those of the draft adapter (lora.train).

    Both commands have keys the other one lacks (train.tokens, train.steps), and keys of the same name that are tuned
    separately (train.global_batch_size, evaluation.every_steps). So an override says that it is for the drafter.
    """

    stages: list[str]
    drafter: list[str]


def split_overrides(words: list[str]) -> Overrides:
    """Read `drafter.train.steps=10` as `train.steps=10` of the drafter, and everything else as the stages'."""
    drafter = [word.removeprefix(DRAFTER_PREFIX) for word in words if word.startswith(DRAFTER_PREFIX)]
    return Overrides([word for word in words if not word.startswith(DRAFTER_PREFIX)], drafter)


def compose_drafter(root: Path, overrides: list[str]) -> DrafterConfig:
    """Compose the drafter's configuration now, so that a mistake shows before the minutes that precede its training.

    Raises:
        UserError: The overrides do not compose, or break a rule.
    """
    try:
        config = compose_drafter_config(["experiment=quickstart", f"run.root={root}", *overrides])
        check_drafter_rules(config, NUM_PROCESSES)
    except UserError as error:
        raise UserError(f"overrides of the draft adapter ({DRAFTER_PREFIX}...): {error}") from error
    return config


def record_request(folder: QuickstartFolder, overrides: list[str]) -> None:
    """Record the overrides with which a folder is begun: its finished phases hold for them alone.

    Raises:
        UserError: The folder was begun with other overrides.
    """
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
    """List the phases from text to responses, in order. configs: by stage."""
    root = f"run.root={folder.root}"
    return [
        Phase(
            "data",
            "text and docstring chats of Python's standard library: tokenizer, training and held-out tokens",
            outputs=[folder.tokenizer, folder.train_data.parent],
            work=lambda: _prepare_data(configs, folder),
        ),
        Phase(
            "start_checkpoint",
            "toy Ministral 3 checkpoint in the released format",
            outputs=[folder.start],
            work=lambda: _write_start_checkpoint(configs["ar"], folder),
        ),
        Phase(
            "ar",
            "ar stage, tensor parallelism 2",
            outputs=[folder.run("ar")],
            work=two_process_command("pretrain.train", "experiment=quickstart_ar", root, *overrides.stages),
            resumes=True,
        ),
        Phase(
            "joint",
            "joint stage, pipeline parallelism 2, from the AR weights",
            outputs=[folder.run("joint")],
            work=two_process_command("pretrain.train", "experiment=quickstart_joint", root, *overrides.stages),
            resumes=True,
        ),
        Phase(
            "export",
            "export to a Hugging Face directory",
            outputs=[folder.export],
            work=module_command("model.convert", "--from", folder.run("joint"), "--to", folder.export),
        ),
        Phase(
            "drafter",
            "draft adapter of the export, data parallelism 2",
            outputs=[folder.run("drafter"), folder.adapter],
            work=two_process_command("lora.train", "experiment=quickstart", root, *overrides.drafter),
            resumes=True,
        ),
        Phase(
            "decode",
            "reload the export and decode in four modes, in one of them with the adapter too",
            outputs=[folder.decoding],
            work=module_command(
                "launch.quickstart.decode",
                *("--export", folder.export, "--heldout", folder.heldout_data, "--output", folder.decoding),
            ),
        ),
        Phase(
            "sft",
            "sft stage, data parallelism 2, from the joint weights",
            outputs=[folder.run("sft")],
            work=two_process_command("pretrain.train", "experiment=quickstart_sft", root, *overrides.stages),
            resumes=True,
        ),
        Phase(
            "export_instruct",
            "export of the instruct checkpoint",
            outputs=[folder.instruct],
            work=module_command("model.convert", "--from", folder.run("sft"), "--to", folder.instruct),
        ),
        Phase(
            "responses",
            "responses to held-out questions, in four modes",
            outputs=[folder.responses],
            work=lambda: write_responses(folder),
        ),
    ]


def _prepare_data(configs: dict[str, RunConfig], folder: QuickstartFolder) -> None:
    from launch.quickstart.toy_inputs import prepare_data  # imports torch and transformers

    prepare_data(configs["ar"], configs["sft"].data, folder)


def _write_start_checkpoint(config: RunConfig, folder: QuickstartFolder) -> None:
    from launch.quickstart.toy_inputs import write_start_checkpoint

    write_start_checkpoint(config.model, folder.tokenizer, folder.start, config.train.seed)


def write_responses(folder: QuickstartFolder) -> None:
    """Ask the instruct export one held-out question per mode, by the command a user would type.

    Writes {"responses": [{prompt, text, mode, ...}]}, each as `python -m model.chat --json` prints it.

    Raises:
        UserError: The command failed.
    """
    responses = []
    for question, mode in zip(choose_questions(folder, len(CHAT_MODES)), CHAT_MODES, strict=True):
        options = ("--prompt", question, "--mode", mode, "--max-new-tokens", MAX_RESPONSE_TOKENS, "--json")
        responses.append(json.loads(read_output("the chat", module_command("model.chat", folder.instruct, *options))))
    atomic_write_text(folder.responses, json.dumps({"responses": responses}, indent=2) + "\n")


def choose_questions(folder: QuickstartFolder, count: int) -> list[str]:
    """Return the first question of `count` held-out chats without a system message, spread over all of them."""
    lines = (folder.text / "heldout_chats.jsonl").read_text(encoding="utf-8").splitlines()
    first = [json.loads(line)["messages"][0] for line in lines]
    questions = [message["content"] for message in first if message["role"] == "user"]
    return questions[:: len(questions) // count][:count]

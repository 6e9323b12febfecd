"""A finished quickstart folder of toy size, written without training."""

import json
from pathlib import Path

import pytest

from conf.composition.compose import compose_drafter_config, compose_run_config
from conf.schema import RunConfig
from conf.schema.drafter import DrafterConfig
from launch.quickstart.folder import QuickstartFolder

MODES = ("ar", "block_diffusion", "linear", "quadratic", "linear+adapter")
EVALUATIONS = {"ar": [4.5, 3.5, 2.9], "joint": [2.8, 2.6, 2.4, 2.3, 2.2], "sft": [2.5, 2.1, 1.9]}


@pytest.fixture
def folder(tmp_path: Path) -> QuickstartFolder:
    return QuickstartFolder(tmp_path / "runs")


@pytest.fixture
def configs() -> dict[str, RunConfig]:
    return {stage: compose_run_config([f"experiment=quickstart_{stage}"]) for stage in EVALUATIONS}


@pytest.fixture
def drafter() -> DrafterConfig:
    return compose_drafter_config(["experiment=quickstart", "adapter.rank=32"])


@pytest.fixture
def finished_folder(folder: QuickstartFolder) -> QuickstartFolder:
    """Write a folder as the phases leave it; losses and measurements are invented but consistent."""
    for stage, losses in EVALUATIONS.items():
        write_run(folder, stage, losses)
    write_json(folder.unigram, {"unigram_entropy": 4.1, "train_tokens": 1000, "heldout_tokens": 100})
    write_drafter_run(folder)
    modes = {mode: measurement(mode) for mode in MODES}
    settings = {"dtype": "float32", "num_prompts": 2, "prompt_tokens": 8, "num_contexts": 4, "block_length": 16}
    write_json(folder.decoding, {**settings, "modes": modes, "sample": {"prompt": "def", "continuation": " f():"}})
    responses = [
        {"prompt": f"What does {mode} do?", "text": "It responds.", "mode": mode, "tokens_per_forward": 1.5}
        for mode in MODES[:4]
    ]
    write_json(folder.responses, {"responses": responses})
    return folder


def write_run(folder: QuickstartFolder, stage: str, heldout: list[float]) -> None:
    """Write the metrics of a run with an evaluation every 10 steps, the first before training."""
    run = folder.run(stage)
    run.mkdir(parents=True)
    lines = []
    for number, loss in enumerate(heldout):
        diffusion = None if stage == "ar" else loss + 1
        entry = {"step": 10 * number, "tokens_seen": 1000 * number, "ar_loss": loss, "diffusion_loss": diffusion}
        if number:
            lines.append({"kind": "train", "loss": loss, **entry})
        lines.append({"kind": "heldout", **entry})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_drafter_run(folder: QuickstartFolder) -> None:
    """Write metrics as lora.train does: an evaluation before training and one at the end."""
    folder.run("drafter").mkdir(parents=True)
    lines = []
    for step, length in ((0, 1.9), (10, 2.3)):
        entry = {"step": step, "tokens_seen": 1000 * step, "acceptance_length": length}
        entry |= {"acceptance_length_sampled": length - 0.1, "loss": 5 - length}
        lines += [{"kind": "train", **entry}] * (step > 0) + [{"kind": "heldout", **entry}]
    (folder.run("drafter") / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def measurement(mode: str) -> dict:
    drafts = mode not in ("ar", "block_diffusion")
    acceptance = {"linear": 1.93, "linear+adapter": 2.21}.get(mode)
    return {
        "new_tokens": 100,
        "num_forwards": 50 if drafts else 100,
        "tokens_per_forward": 2.0 if drafts else 1.0,
        "acceptance_length": 4.0 if drafts else None,
        "real_context_acceptance": acceptance,
        "tokens_per_second": 321.0,
        "equals_greedy_ar": mode != "block_diffusion",
        "distinct_4grams": 0.5,
    }


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))

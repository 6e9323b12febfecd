"""Collect the results of all phases in summary.json, and check that they are those of a working system."""

import json
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any

from conf.schema import RunConfig
from conf.schema.drafter import DrafterConfig
from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from launch.quickstart.folder import QuickstartFolder, load_json
from launch.quickstart.loss_curves import StageCurves, load_curves
from launch.quickstart.phases import NUM_PROCESSES
from model.evaluate.variants import LINEAR_ADAPTER
from model.hf.options import AR, BLOCK_DIFFUSION, LINEAR, QUADRATIC

MEASURED_MODES = (AR, BLOCK_DIFFUSION, LINEAR, QUADRATIC, LINEAR_ADAPTER)
PACKAGES = ("torch", "megatron-core", "transformers", "peft", "deepspeed", "tokenizers", "hydra-core", "numpy")
AR_MARGIN_NATS = 0.5
MIN_EVALUATIONS = 4
MIN_ACCEPTANCE = 1.8
BREAK_EVEN = 2.0  # a draft-verify cycle costs two forwards, AR one per token


@dataclass
class SummaryCheck:
    """States one thing that must hold. value, wanted: for reading."""

    name: str
    value: str
    wanted: str
    passed: bool


def build_summary(
    folder: QuickstartFolder,
    stages: list[StageCurves],
    configs: dict[str, RunConfig],
    drafter: DrafterConfig,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Collect what the phases wrote. configs: by stage; seconds: by phase.

    Raises:
        UserError: A result is missing.
    """
    decoding = _load_decoding(folder)
    unigram_entropy = load_json(folder.unigram)["unigram_entropy"]
    summary = {
        "modes": decoding["modes"],
        "stages": {stage.stage: summarize_stage(stage, configs[stage.stage]) for stage in stages},
        "drafter": summarize_drafter(load_curves("drafter", folder.run("drafter")), drafter),
        "unigram_entropy": unigram_entropy,
        "export_dir": str(folder.export),
        "adapter_dir": str(folder.adapter),
        "seconds": seconds | {"total": round(sum(seconds.values()), 2)},
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
        "responses": load_json(folder.responses)["responses"],
        "decoding": {name: value for name, value in decoding.items() if name != "modes"},
    }
    summary["checks"] = [asdict(check) for check in check_summary(summary)]
    return summary


def _load_decoding(folder: QuickstartFolder) -> dict[str, Any]:
    decoding = load_json(folder.decoding)
    if missing := set(MEASURED_MODES) - set(decoding["modes"]):
        raise UserError(
            f"{folder.decoding} was written by an earlier version and lacks {', '.join(sorted(missing))}: delete it "
            "and run the quickstart again."
        )
    return decoding


def save_summary(folder: QuickstartFolder, summary: dict[str, Any]) -> None:
    """Write summary.json."""
    atomic_write_text(folder.summary, json.dumps(summary, indent=2) + "\n")


def summarize_stage(curves: StageCurves, config: RunConfig) -> dict[str, Any]:
    """Describe one stage: its layout and length, first and last losses, and held-out losses at every evaluation."""
    first, last, heldout = curves.train[0], curves.train[-1], curves.heldout[-1]
    parallel = config.parallel
    return {
        "layout": {
            "tensor_parallel": parallel.tensor_parallel,
            "pipeline_parallel": parallel.pipeline_parallel,
            "data_parallel": NUM_PROCESSES // parallel.model_parallel,
        },
        "steps": last["step"],
        "tokens": last["tokens_seen"],
        "first_train_loss": first["loss"],
        "last_train_loss": last["loss"],
        "heldout_ar_loss": heldout["ar_loss"],
        "heldout_diffusion_loss": heldout.get("diffusion_loss"),
        "heldout_evaluations": [
            {name: entry.get(name) for name in ("step", "tokens_seen", "ar_loss", "diffusion_loss")}
            for entry in curves.heldout
        ],
    }


def summarize_drafter(curves: StageCurves, config: DrafterConfig) -> dict[str, Any]:
    """Describe the draft adapter's training: its shape and length, and held-out acceptance at every evaluation."""
    first, last = curves.train[0], curves.train[-1]
    return {
        "rank": config.adapter.rank,
        "alpha": config.adapter.alpha,
        "data_parallel": NUM_PROCESSES,
        "steps": last["step"],
        "tokens": last["tokens_seen"],
        "first_train_loss": first["loss"],
        "last_train_loss": last["loss"],
        "heldout_evaluations": [
            {name: entry[name] for name in ("step", "tokens_seen", "acceptance_length", "acceptance_length_sampled")}
            for entry in curves.heldout
        ],
    }


def check_summary(summary: dict[str, Any]) -> list[SummaryCheck]:
    """Check what a working system reaches."""
    return [*check_losses(summary), *check_speculation(summary["modes"])]


def check_losses(summary: dict[str, Any]) -> list[SummaryCheck]:
    """Check that every training stage learns."""
    joint, sft = summary["stages"]["joint"], summary["stages"]["sft"]
    margin = summary["unigram_entropy"] - joint["heldout_ar_loss"]
    losses = [entry["diffusion_loss"] for entry in joint["heldout_evaluations"]]
    falls = all(after < before for before, after in pairwise(losses))
    responses = [entry["ar_loss"] for entry in sft["heldout_evaluations"]]
    return [
        SummaryCheck(
            "held-out AR loss below the unigram entropy",
            f"{margin:.2f} nats",
            f">= {AR_MARGIN_NATS} nats",
            margin >= AR_MARGIN_NATS,
        ),
        SummaryCheck(
            "held-out diffusion loss falls at every evaluation",
            " > ".join(f"{loss:.2f}" for loss in losses),
            f"falling, >= {MIN_EVALUATIONS} evaluations",
            falls and len(losses) >= MIN_EVALUATIONS,
        ),
        SummaryCheck(
            "held-out loss of responses falls in instruct tuning",
            f"{responses[0]:.2f} -> {responses[-1]:.2f}",
            "lower at the end",
            responses[-1] < responses[0],
        ),
    ]


def check_speculation(modes: dict[str, Any]) -> list[SummaryCheck]:
    """Check that drafts are accepted, and that speculation leaves the text of greedy AR unchanged."""
    wanted = {LINEAR: ("", MIN_ACCEPTANCE, ""), LINEAR_ADAPTER: (" with the adapter", BREAK_EVEN, ", break-even")}
    checks = []
    for mode, (how, least, meaning) in wanted.items():
        acceptance, equal = modes[mode]["real_context_acceptance"], modes[mode]["equals_greedy_ar"]
        checks += [
            SummaryCheck(
                f"tokens per draft-verify cycle{how} on real contexts",
                f"{acceptance:.2f}",
                f"> {least}{meaning}",
                acceptance > least,
            ),
            _check_equality(f"linear speculation{how}", equal),
        ]
    return [*checks, _check_equality("quadratic speculation", modes[QUADRATIC]["equals_greedy_ar"])]


def _check_equality(what: str, is_equal: bool) -> SummaryCheck:
    return SummaryCheck(f"{what} equals greedy AR in fp32", "yes" if is_equal else "no", "yes", is_equal)

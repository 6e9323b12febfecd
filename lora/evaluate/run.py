"""The evaluation as a function: what the command line and the benchmark call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora.evaluate.statistics import GroupGain, summarize_gain
from model.commands.modes import choose_variants
from model.evaluate.decoder import Track
from model.evaluate.evaluation import evaluate_modes
from model.evaluate.judging import JudgedBatch
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt
from model.hf.options import AR, LINEAR

# Settings that say how the numbers came about; the others have no effect here.
SETTINGS = ("dtype", "device", "block_length", "max_new_tokens", "resamples")


@dataclass(frozen=True)
class DrafterEvaluation:
    """groups: in the order in which prompts name them. batches: of one prompt each. settings: for reports.

    differences: place and mode of outputs that are not AR's though they should be: a defect, or a broken device.
    """

    overall: GroupGain
    groups: dict[str, GroupGain]
    batches: list[JudgedBatch]
    settings: dict[str, Any]
    differences: list[tuple[str, str]]


def evaluate_drafter(
    model: Any,
    prompts: Sequence[EvaluationPrompt],
    options: EvaluationOptions | None = None,
    *,
    stop_ids: tuple[int, ...] | None = None,
    track: Track = iter,
) -> DrafterEvaluation:
    """Decode every prompt by AR and by linear self-speculation without and with the attached draft adapter.

    model: an export's, loaded any way, with a draft adapter attached (see attach_adapter) and switched on.
    stop_ids: tokens that end an answer; None takes the model's own. track: wraps the jobs in a progress bar.

    Raises: UserError if the model has no adapter, or prompts are missing or too long.
    """
    options = options or EvaluationOptions()
    variants = choose_variants((AR, LINEAR), has_adapter=True)
    evaluation = evaluate_modes(model, prompts, variants, options, stop_ids=stop_ids, track=track)
    resampling = (options.resamples, options.resampling_seed)
    settings = {name: evaluation.settings[name] for name in SETTINGS} | {"seed": options.resampling_seed}
    return DrafterEvaluation(
        overall=summarize_gain(evaluation.batches, *resampling),
        groups={
            name: summarize_gain([batch for batch in evaluation.batches if batch.group == name], *resampling)
            for name in evaluation.groups
        },
        batches=evaluation.batches,
        settings=settings,
        differences=evaluation.differences,
    )

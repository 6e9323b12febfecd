"""The evaluation as a function: what the command line, the quickstart and the benchmark call."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from conf.errors import UserError
from lora.evaluation.decoding import PromptDecoder
from lora.evaluation.options import EvaluationOptions
from lora.evaluation.prompts import check_room
from lora.evaluation.records import SPECULATIVE, Agreement, DecodedPrompt, Prompt
from lora.evaluation.statistics import GroupNumbers, summarize
from model.hf.adapter_nemotron_labs_diffusion import find_draft_adapter_layers
from model.load import find_stop_ids

Track = Callable[[Sequence[Prompt]], Iterable[Prompt]]


@dataclass(frozen=True)
class Evaluation:
    """groups: in the order in which prompts name them. settings: dtype, device and lengths, for reports."""

    overall: GroupNumbers
    groups: dict[str, GroupNumbers]
    decoded: list[DecodedPrompt]
    settings: dict[str, Any]

    @property
    def differences(self) -> list[tuple[str, str]]:
        """Place and mode of outputs that are not AR's though they should be: a defect, or a broken device."""
        return [
            (decoded.prompt.place, mode)
            for decoded in self.decoded
            for mode in SPECULATIVE
            if decoded.agreements[mode] is Agreement.different
        ]


def evaluate_drafter(
    model: Any,
    prompts: Sequence[Prompt],
    options: EvaluationOptions | None = None,
    *,
    stop_ids: tuple[int, ...] | None = None,
    track: Track = iter,
) -> Evaluation:
    """Decode every prompt by AR and by linear self-speculation without and with the attached draft adapter.

    model: an export's, loaded any way, with a draft adapter attached (see attach_adapter) and switched on.
    stop_ids: tokens that end an answer; None takes the model's own. track: wraps the prompts in a progress bar.

    Raises: UserError if the model has no adapter, or prompts are missing or too long.
    """
    options = options or EvaluationOptions()
    if not find_draft_adapter_layers(model):
        raise UserError("the model has no draft adapter to evaluate: attach one")
    if not prompts:
        raise UserError("there are no prompts to evaluate on: give at least one")
    check_room(prompts, options.max_new_tokens, model.config.max_position_embeddings)
    block_length = options.block_length or model.config.block_size
    decoder = PromptDecoder(
        model,
        max_new_tokens=options.max_new_tokens,
        block_length=block_length,
        stop_ids=find_stop_ids(model) if stop_ids is None else stop_ids,
    )
    decoder.warm_up(prompts[0])
    decoded = [decoder.decode(prompt) for prompt in track(prompts)]
    weight = model.get_input_embeddings().weight
    settings = {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "block_length": block_length,
        "max_new_tokens": options.max_new_tokens,
        "resamples": options.resamples,
        "seed": options.seed,
    }
    groups = {
        group: summarize([d for d in decoded if d.prompt.group == group], options.resamples, options.seed)
        for group in dict.fromkeys(prompt.group for prompt in prompts)
    }
    return Evaluation(summarize(decoded, options.resamples, options.seed), groups, decoded, settings)

"""Evaluates a loaded model: the function that the command lines call."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from model.evaluate.ceiling import Ceiling, add_ceilings, measure_ceiling
from model.evaluate.choice_scoring import WAYS, ChoiceScorer, ChoiceScores
from model.evaluate.decoder import BatchDecoder, Track, decode_all
from model.evaluate.judging import Agreement, BatchJudge, JudgedBatch, require_tokenizer
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import EvaluationPrompt, check_choices, check_masks, check_room, make_batches
from model.evaluate.statistics import ChoiceNumbers, GroupNumbers, summarize, summarize_choices
from model.evaluate.variants import Variant
from model.export.load import find_stop_ids, find_think_ids
from model.hf.layers import DraftAdapter
from model.hf.options import AR


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        variants: by name, in the order of decoding.
        overall: the numbers of all prompts.
        groups: the numbers of each group, in the order in which prompts name them.
        batches: every batch with its responses.
        ceilings: the speed of light by the prompt's place; empty unless asked for.
        choices: the scores of each question's choices by its place, then by the way of scoring.
        settings: dtype, device and options, for reports.
    """

    variants: dict[str, Variant]
    overall: GroupNumbers
    groups: dict[str, GroupNumbers]
    batches: list[JudgedBatch]
    ceilings: dict[str, Ceiling]
    choices: dict[str, dict[str, ChoiceScores]]
    settings: dict[str, Any]

    @property
    def plain_variants(self) -> list[Variant]:
        """Variants outside the threshold sweep."""
        return [variant for variant in self.variants.values() if variant.threshold is None]

    @property
    def swept_variants(self) -> list[Variant]:
        """Variants of the threshold sweep."""
        return [variant for variant in self.variants.values() if variant.threshold is not None]

    def add_ceilings(self, group: str | None = None) -> Ceiling | None:
        """Return the ceiling of a group's responses together (None: of all); None if it was not measured."""
        chosen = [prompt for batch in self.batches for prompt in batch.prompts if group in (None, prompt.group)]
        return add_ceilings([self.ceilings[prompt.place] for prompt in chosen]) if self.ceilings else None

    def summarize_choices(self, group: str | None = None) -> dict[str, ChoiceNumbers]:
        """Return the numbers of a group's questions (None: of all) by the way of scoring; empty if there are none."""
        prompts = [prompt for batch in self.batches for prompt in batch.prompts if group in (None, prompt.group)]
        asked = [(prompt.choices, self.choices[prompt.place]) for prompt in prompts if prompt.choices]
        return {way: summarize_choices([(choices, scores[way]) for choices, scores in asked]) for way in WAYS if asked}

    @property
    def differences(self) -> list[tuple[str, str]]:
        """Place and variant of outputs that must be AR's but are not: a defect, or a broken device."""
        return [
            (prompt.place, name)
            for batch in self.batches
            for name, agreements in batch.agreements.items()
            for prompt, agreement in zip(batch.prompts, agreements, strict=True)
            if agreement is Agreement.different and self.variants[name].is_lossless
        ]


def evaluate_modes(
    model: Any,
    prompts: Sequence[EvaluationPrompt],
    variants: Sequence[Variant],
    options: EvaluationOptions,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    stop_ids: Sequence[int] | None = None,
    track: Track = iter,
) -> Evaluation:
    """Decode every prompt in every variant. Greedy evaluations always begin with AR, their reference.

    Args:
        model: an export, loaded in any way; its draft adapter is attached and switched on if a variant needs it.
        prompts: at least one.
        variants: modes, with or without the adapter, at their thresholds.
        options: what all variants share.
        tokenizer: needed for answers, texts and a thinking budget.
        stop_ids: tokens that end a response; None takes the model's own.
        track: wraps the jobs in a progress bar.

    Raises:
        UserError: the model has no adapter, prompts are missing or too long, or options contradict each other.
    """
    check_request(model, prompts, variants, options)
    if options.is_greedy:
        variants = [Variant(AR), *(variant for variant in variants if variant != Variant(AR))]
    think_ids = (
        None if options.thinking_budget is None else find_think_ids(require_tokenizer(tokenizer, "a thinking budget"))
    )
    stop_ids = find_stop_ids(model) if stop_ids is None else stop_ids
    decoder = BatchDecoder(model, options, stop_ids=stop_ids, think_token_ids=think_ids)
    block_length = options.block_length or model.config.block_size
    batches = make_batches(prompts, options.batch_size)
    # Warm up: libraries choose kernels and allocate memory before anything is timed, and what does not fit fails early.
    largest = max(batches, key=lambda batch: len(batch) * max(len(prompt.token_ids) for prompt in batch))
    for variant in variants:
        decoder.decode(variant, largest, max_new_tokens=min(options.max_new_tokens, 2 * block_length))
    decoded = decode_all(decoder, variants, batches, track)
    judge = BatchJudge(model, options, tokenizer)
    judged = [judge.judge(batch, results) for batch, results in zip(batches, decoded, strict=True)]
    ceilings = {}
    if options.speed_of_light:
        ceilings = measure_ceilings(model, judged, block_length, options.max_new_tokens, track)
    groups = {
        name: [batch for batch in judged if batch.group == name] for name in dict.fromkeys(p.group for p in prompts)
    }
    intervals = {"resamples": options.resamples, "seed": options.resampling_seed}
    return Evaluation(
        variants={variant.name: variant for variant in variants},
        overall=summarize(judged, **intervals),
        groups={name: summarize(members, **intervals) for name, members in groups.items()},
        batches=judged,
        ceilings=ceilings,
        choices=score_choices(model, batches, block_length, track),
        settings=describe_settings(model, options, block_length),
    )


def check_request(
    model: Any, prompts: Sequence[EvaluationPrompt], variants: Sequence[Variant], options: EvaluationOptions
) -> None:
    """Refuse what cannot be evaluated. Raises: UserError."""
    if not prompts:
        raise UserError("there are no prompts to evaluate on: give at least one")
    if any(variant.with_adapter for variant in variants) and not DraftAdapter(model):
        raise UserError("the model has no draft adapter to evaluate: attach one")
    if options.speed_of_light and not options.is_greedy:
        raise UserError("the speed of light follows greedy AR's text: leave the temperature at 0")
    if options.speed_of_light and options.thinking_budget is not None:
        raise UserError("the speed of light cannot follow a thinking budget: leave one of the two out")
    check_room(prompts, options.max_new_tokens, model.config.max_position_embeddings)
    check_choices(prompts, options.block_length or model.config.block_size, model.config.max_position_embeddings)
    check_masks(prompts, model.config.mask_token_id)


def measure_ceilings(
    model: Any, batches: Sequence[JudgedBatch], block_length: int, max_new_tokens: int, track: Track
) -> dict[str, Ceiling]:
    """Measure the ceiling of every prompt, by its place, along greedy AR's response."""
    jobs = [job for batch in batches for job in zip(batch.prompts, batch.decoded[AR].tokens, strict=True)]
    return {
        prompt.place: measure_ceiling(
            model,
            prompt.token_ids,
            response,
            block_length=block_length,
            max_new_tokens=max_new_tokens,
            images=prompt.images,
        )
        for prompt, response in track(jobs)
    }


def score_choices(
    model: Any, batches: Sequence[Sequence[EvaluationPrompt]], block_length: int, track: Track
) -> dict[str, dict[str, ChoiceScores]]:
    """Score the choices of every question, by its place and the way of scoring."""
    scorer = ChoiceScorer(model, block_length)
    asking = [batch for batch in batches if any(prompt.choices for prompt in batch)]
    scored = [
        (prompt, scores) for batch in track(asking) for prompt, scores in zip(batch, scorer.score(batch), strict=True)
    ]
    return {prompt.place: scores for prompt, scores in scored if scores}


def describe_settings(model: Any, options: EvaluationOptions, block_length: int) -> dict[str, Any]:
    """Return dtype, device and all options, for reports."""
    weight = model.get_input_embeddings().weight
    place = {"dtype": str(weight.dtype).removeprefix("torch."), "device": str(weight.device)}
    return place | asdict(options) | {"block_length": block_length}

"""The evaluation as a function: what the command lines call."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerFast

from conf.system.errors import UserError
from model.evaluate.agreement import AgreementJudge
from model.evaluate.ceiling import Ceiling, add_ceilings, measure_ceiling
from model.evaluate.decoding import Decoder
from model.evaluate.options import EvaluationOptions
from model.evaluate.prompts import check_masks, check_room, make_batches
from model.evaluate.records import AR, Agreement, Decoded, DecodedBatch, Prompt, Variant
from model.evaluate.scoring import is_correct
from model.evaluate.statistics import GroupNumbers, summarize
from model.export.load import THINK_TOKENS, find_stop_ids, find_think_ids
from model.hf.adapter_nemotron_labs_diffusion import DraftAdapter

# Wraps a list of jobs in a progress bar.
Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Evaluation:
    """variants: by name, in the order of decoding. groups: in the order in which prompts name them.

    ceilings: by place of the prompt; empty unless asked for. settings: dtype, device and options, for reports.
    """

    variants: dict[str, Variant]
    overall: GroupNumbers
    groups: dict[str, GroupNumbers]
    batches: list[DecodedBatch]
    ceilings: dict[str, Ceiling]
    settings: dict[str, Any]

    @property
    def plain_variants(self) -> list[Variant]:
        """Those that are no part of a sweep of thresholds."""
        return [variant for variant in self.variants.values() if variant.threshold is None]

    @property
    def swept_variants(self) -> list[Variant]:
        """Those that are."""
        return [variant for variant in self.variants.values() if variant.threshold is not None]

    def add_ceilings(self, group: str | None = None) -> Ceiling | None:
        """That of a group's responses together, or of all (None); None if none was measured."""
        chosen = [prompt for batch in self.batches for prompt in batch.prompts if group in (None, prompt.group)]
        return add_ceilings([self.ceilings[prompt.place] for prompt in chosen]) if self.ceilings else None

    @property
    def differences(self) -> list[tuple[str, str]]:
        """Place and variant of outputs that are not AR's though they should be: a defect, or a broken device."""
        return [
            (prompt.place, name)
            for batch in self.batches
            for name, agreements in batch.agreements.items()
            for prompt, agreement in zip(batch.prompts, agreements, strict=True)
            if agreement is Agreement.different and self.variants[name].is_lossless
        ]


def evaluate_modes(
    model: Any,
    prompts: Sequence[Prompt],
    variants: Sequence[Variant],
    options: EvaluationOptions,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    stop_ids: Sequence[int] | None = None,
    track: Track = iter,
) -> Evaluation:
    """Decode every prompt in every variant. Greedy evaluations begin with AR, asked for or not: it is the reference.

    model: an export's, loaded any way; with a draft adapter attached and switched on if a variant needs it.
    tokenizer: needed for answers, texts and a thinking budget. stop_ids: end a response; None takes the model's own.
    track: wraps the jobs in a progress bar.

    Raises: UserError if the model has no adapter, prompts are missing or too long, or options contradict each other.
    """
    check_request(model, prompts, variants, options)
    if options.is_greedy:
        variants = [Variant(AR), *(variant for variant in variants if variant != Variant(AR))]
    think_ids = None if options.thinking_budget is None else find_think_ids(_require(tokenizer, "a thinking budget"))
    stop_ids = find_stop_ids(model) if stop_ids is None else stop_ids
    decoder = Decoder(model, options, stop_ids=stop_ids, think_token_ids=think_ids)
    block_length = options.block_length or model.config.block_size
    batches = make_batches(prompts, options.batch_size)
    # Libraries choose kernels and allocate memory before anything is timed; what does not fit fails before hours of it.
    largest = max(batches, key=lambda batch: len(batch) * max(len(prompt.token_ids) for prompt in batch))
    for variant in variants:
        decoder.decode(variant, largest, max_new_tokens=min(options.max_new_tokens, 2 * block_length))
    decoded = decode_all(decoder, variants, batches, track)
    finish = BatchFinisher(model, options, tokenizer)
    finished = [finish(batch, results) for batch, results in zip(batches, decoded, strict=True)]
    ceilings = {}
    if options.speed_of_light:
        ceilings = measure_ceilings(model, finished, block_length, options.max_new_tokens, track)
    groups = {name: [b for b in finished if b.group == name] for name in dict.fromkeys(p.group for p in prompts)}
    intervals = {"resamples": options.resamples, "seed": options.resampling_seed}
    return Evaluation(
        variants={variant.name: variant for variant in variants},
        overall=summarize(finished, **intervals),
        groups={name: summarize(members, **intervals) for name, members in groups.items()},
        batches=finished,
        ceilings=ceilings,
        settings=describe_settings(model, options, block_length),
    )


def check_request(
    model: Any, prompts: Sequence[Prompt], variants: Sequence[Variant], options: EvaluationOptions
) -> None:
    """Raises: UserError for what cannot be evaluated."""
    if not prompts:
        raise UserError("there are no prompts to evaluate on: give at least one")
    if any(variant.with_adapter for variant in variants) and not DraftAdapter(model):
        raise UserError("the model has no draft adapter to evaluate: attach one")
    if options.speed_of_light and not options.is_greedy:
        raise UserError("the speed of light is measured along greedy AR's text: leave the temperature at 0")
    if options.speed_of_light and options.thinking_budget is not None:
        raise UserError("the speed of light is of free text: its oracle knows no thinking budget, leave it out")
    check_room(prompts, options.max_new_tokens, model.config.max_position_embeddings)
    check_masks(prompts, model.config.mask_token_id)


def decode_all(
    decoder: Decoder, variants: Sequence[Variant], batches: Sequence[Sequence[Prompt]], track: Track
) -> list[dict[str, Decoded]]:
    """Of every batch by name of the variant. Variants take turns, so that whatever else happens meets them alike."""
    first = list(accumulate((len(batch) for batch in batches), initial=0))
    decoded: list[dict[str, Decoded]] = [{} for _ in batches]
    for number, variant in track([(number, variant) for number in range(len(batches)) for variant in variants]):
        decoded[number][variant.name] = decoder.decode(variant, batches[number], number=first[number])
    return decoded


class BatchFinisher:
    """Adds to what was decoded whether it is AR's and whether it is correct."""

    def __init__(self, model: Any, options: EvaluationOptions, tokenizer: PreTrainedTokenizerFast | None):
        self._judge = AgreementJudge(model)
        self._options, self._tokenizer = options, tokenizer
        self._pattern = None if options.answer_pattern is None else re.compile(options.answer_pattern)

    def __call__(self, prompts: Sequence[Prompt], decoded: dict[str, Decoded]) -> DecodedBatch:
        agreements, texts, correct = {}, {}, {}
        if self._options.is_greedy:
            agreements = {name: self._compare(prompts, decoded[AR], result) for name, result in decoded.items()}
        if any(prompt.answers for prompt in prompts):
            correct = {name: self._score(prompts, result) for name, result in decoded.items()}
        if self._options.keep_texts:
            texts = {name: [self._spell(tokens) for tokens in result.tokens] for name, result in decoded.items()}
        return DecodedBatch(prompts, decoded, agreements, correct, texts)

    def _compare(self, prompts: Sequence[Prompt], ar: Decoded, other: Decoded) -> list[Agreement]:
        rows = zip(prompts, ar.tokens, other.tokens, strict=True)
        return [self._judge.compare(prompt.token_ids, expected, tokens) for prompt, expected, tokens in rows]

    def _spell(self, tokens: list[int]) -> str:
        tokenizer = _require(self._tokenizer, "scoring or keeping texts")
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    def _score(self, prompts: Sequence[Prompt], result: Decoded) -> list[bool | None]:
        return [
            is_correct(self._spell(self._cut_thinking(tokens)), prompt.answers, self._pattern)
            if prompt.answers
            else None
            for prompt, tokens in zip(prompts, result.tokens, strict=True)
        ]

    def _cut_thinking(self, tokens: list[int]) -> list[int]:
        """What stands behind the last </think>."""
        end = _require(self._tokenizer, "scoring").get_vocab().get(THINK_TOKENS[1])
        return tokens if end not in tokens else tokens[len(tokens) - tokens[::-1].index(end) :]


def measure_ceilings(
    model: Any, batches: Sequence[DecodedBatch], block_length: int, max_new_tokens: int, track: Track
) -> dict[str, Ceiling]:
    """By the place of each prompt, along what greedy AR wrote there."""
    jobs = [pair for batch in batches for pair in zip(batch.prompts, batch.decoded[AR].tokens, strict=True)]
    return {
        prompt.place: measure_ceiling(
            model, prompt.token_ids, response, block_length=block_length, max_new_tokens=max_new_tokens
        )
        for prompt, response in track(jobs)
    }


def describe_settings(model: Any, options: EvaluationOptions, block_length: int) -> dict[str, Any]:
    """For reports: dtype, device, and all options."""
    weight = model.get_input_embeddings().weight
    place = {"dtype": str(weight.dtype).removeprefix("torch."), "device": str(weight.device)}
    return place | asdict(options) | {"block_length": block_length}


def _require(tokenizer: PreTrainedTokenizerFast | None, what: str) -> PreTrainedTokenizerFast:
    assert tokenizer is not None, f"{what} needs the tokenizer"
    return tokenizer

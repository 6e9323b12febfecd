"""What a decode can be asked for, checked: its modes, and one set of options for all of them. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

MODES = AR, BLOCK_DIFFUSION, LINEAR, QUADRATIC = "ar", "block_diffusion", "linear", "quadratic"
SPECULATIVE = (LINEAR, QUADRATIC)

BLOCK_DIFFUSION_THRESHOLD = 0.9  # of the released models
WHOLE_NUMBERS = ("max_new_tokens", "block_length", "top_k", "mask_groups", "thinking_budget", "seed")


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode; a mode ignores what it has no use for. Every default of decoding is here.

    block_length: tokens of a block, its seed included; None takes the config's block_size.
    threshold: a probability (at temperature 1). Block diffusion commits masked positions that reach it (None: 0.9);
        in speculation a draft ends before the first less probable token (None: 0, never).
    causal_context: of block diffusion; false decodes as a pure diffusion model.
    temperature: 0 is greedy. top_k, top_p: keep the k best tokens, the fewest that hold probability p; None keeps all.
    seed: of the random numbers; None takes torch's global generator.
    eos_token_id: one or several ids that end a row; None takes the checkpoint's, [] never stops.
    mask_token_id: None takes the config's.
    mask_groups: of quadratic speculation, how many groups of masks are computed per forward; None computes all.
    thinking_budget: tokens between <think> and </think> at most, the latter then being forced; None is no limit.
    think_token_ids: ids of <think> and </think>; the default is that of the instruct models.
    streamer: gets tokens as they become final (see TokenStream).
    """

    max_new_tokens: int = 128
    block_length: int | None = None
    threshold: float | None = None
    causal_context: bool = True
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    eos_token_id: int | Iterable[int] | None = None
    mask_token_id: int | None = None
    mask_groups: int | None = None
    thinking_budget: int | None = None
    think_token_ids: tuple[int, int] = (12, 13)
    streamer: "BaseStreamer | None" = None


def check_options(config: Any, options: DecodeOptions) -> None:
    """ValueError for values that no mode can serve. config: the model's."""
    _check_kinds(options)
    if options.seed is not None and not -(1 << 63) <= options.seed < 1 << 64:
        raise ValueError(f"seed is {options.seed}; it must fit into 64 bits")
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {options.max_new_tokens}; it must be at least 1")
    if not 0 <= options.temperature < float("inf"):  # not a number fails too
        raise ValueError(f"temperature is {options.temperature}; it must be 0 (greedy) or positive")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise ValueError(f"threshold is {options.threshold}; it is a probability between 0 and 1")
    if options.top_k is not None and options.top_k < 1:
        raise ValueError(f"top_k is {options.top_k}; it must be at least 1, or None to keep all tokens")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"top_p is {options.top_p}; it must be above 0 and at most 1")
    if options.mask_groups is not None and options.mask_groups < 1:
        raise ValueError(f"mask_groups is {options.mask_groups}; it must be at least 1, or None for all")
    _check_block_length(config, options.block_length)
    _check_thinking(config, options)


def _check_kinds(options: DecodeOptions) -> None:
    """ValueError for what is no number, or none where one is needed."""
    kinds: list[tuple[str, Any, str]] = [(name, int, "a whole number") for name in WHOLE_NUMBERS]
    kinds += [(name, (int, float), "a number") for name in ("temperature", "threshold", "top_p")]
    for name, kind, what in kinds:
        value = getattr(options, name)
        may_be_none = name not in ("max_new_tokens", "temperature")
        if isinstance(value, bool) or not (isinstance(value, kind) or (value is None and may_be_none)):
            raise ValueError(f"{name} is {value!r}; it must be {what}")


def _check_block_length(config: Any, block_length: int | None) -> None:
    if block_length is not None and block_length < 2:
        raise ValueError(f"block_length is {block_length}; it must be at least 2: the seed and a token to predict")
    if block_length is not None and block_length > config.max_position_embeddings:
        raise ValueError(
            f"block_length is {block_length}; the model has no more than {config.max_position_embeddings} positions"
        )


def _check_thinking(config: Any, options: DecodeOptions) -> None:
    if options.thinking_budget is None:
        return
    if options.thinking_budget < 0:
        raise ValueError(f"thinking_budget is {options.thinking_budget}; it must be 0 or more, or None for no limit")
    for token_id in options.think_token_ids:
        if not 0 <= token_id < config.vocab_size or token_id == resolve_mask_token_id(config, options.mask_token_id):
            raise ValueError(f"think_token_ids holds {token_id}, which is no token that can be decoded")


def resolve_block_length(config: Any, options: DecodeOptions) -> int:
    """Tokens of a block, those of `config` by default."""
    return config.block_size if options.block_length is None else options.block_length


def resolve_mask_token_id(config: Any, mask_token_id: int | None = None) -> int:
    """The given id, else the config's. Raises ValueError outside the vocabulary."""
    resolved = config.mask_token_id if mask_token_id is None else mask_token_id
    if not 0 <= resolved < config.vocab_size:
        raise ValueError(f"mask_token_id {resolved} is outside the vocabulary 0..{config.vocab_size - 1}")
    return resolved


def resolve_stop_ids(model: Any, eos_token_id: Any) -> tuple[int, ...]:
    """Ids that end a row: the given one or ones, else those of generation_config.json, else of config.json.

    An empty list means never.
    """
    generation = getattr(model, "generation_config", None)
    eos = eos_token_id
    for source in (generation, model.config):
        eos = getattr(source, "eos_token_id", None) if eos is None else eos
    if eos is None:
        return ()
    if hasattr(eos, "tolist"):  # a tensor
        eos = eos.tolist()
    return (eos,) if isinstance(eos, int) else tuple(int(token_id) for token_id in eos)


def check_stop_ids(stop_ids: tuple[int, ...], vocab_size: int, mask_token_id: int) -> None:
    """ValueError for ids that are never chosen: rows would not stop at them."""
    for stop_id in stop_ids:
        if not 0 <= stop_id < vocab_size:
            raise ValueError(f"eos_token_id {stop_id} is outside the vocabulary 0..{vocab_size - 1}")
        if stop_id == mask_token_id:
            raise ValueError(f"eos_token_id {stop_id} is the mask token, which is never chosen")

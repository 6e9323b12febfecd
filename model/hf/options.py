"""What passes into and out of a decode: the modes, the options with every default and check, the result.

Imports no torch, so that command lines can start with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.generation.streamers import BaseStreamer

MODES = AR, BLOCK_DIFFUSION, LINEAR, QUADRATIC = "ar", "block_diffusion", "linear", "quadratic"
SPECULATIVE = (LINEAR, QUADRATIC)

BLOCK_DIFFUSION_THRESHOLD = 0.9  # in use for the released models; what commands take by default
WHOLE_NUMBERS = ("max_new_tokens", "block_length", "top_k", "mask_groups", "thinking_budget", "seed")
WHOLE_NUMBERS += ("max_thinking_tokens", "end_think_token_id")
# The modes that read an option; options that are not listed are read by all of them.
MODES_THAT_READ = {
    "block_length": (BLOCK_DIFFUSION, LINEAR, QUADRATIC),
    "threshold": (BLOCK_DIFFUSION, LINEAR, QUADRATIC),
    "causal_context": (BLOCK_DIFFUSION,),
    "denoise_after_stop": (BLOCK_DIFFUSION,),
    "mask_groups": (QUADRATIC,),
    "verifier_weight": (QUADRATIC,),
}
NEVER_STOP = -1  # as eos_token_id of the released models
SAMPLING_OPTIONS = ("top_k", "top_p", "seed")  # read at a temperature above 0


@dataclass(frozen=True)
class DecodeOptions:
    """How to decode. A value other than the default is refused where the mode or greedy decoding ignores it.

    Attributes:
        max_new_tokens: the most tokens to add to a prompt, the stop token included.
        block_length: tokens of a block, its seed included; None takes the config's block_size. Not for AR.
        threshold: a probability (at temperature 1). Block diffusion commits masked positions that reach it (None: only
            the most probable one per forward, as the released models do); in speculation a draft ends before the first
            less probable token (None: 0, never). Not for AR.
        causal_context: False decodes as a pure diffusion model. For block diffusion alone.
        denoise_after_stop: whether positions after a stop token go on being committed, and read, while one before it is
            masked, as in the released models. False drops them at once. For block diffusion alone.
        temperature: 0 is greedy.
        top_k: sample from the k most probable tokens; None from all.
        top_p: sample from the fewest tokens that hold probability p; None from all.
        seed: seeds the random numbers; None takes torch's global generator.
        eos_token_id: one or several ids that end a sequence; None takes the checkpoint's, [] never stops.
        mask_token_id: None takes the config's.
        mask_groups: groups of masks computed per forward; None computes all. For quadratic speculation alone.
        verifier_weight: lambda of the distribution that verifies, lambda p_AR + (1 - lambda) p_diffusion (the report's
            appendix C). Output is AR's at 1 alone. For quadratic speculation alone.
        thinking_budget: the most tokens between <think> and </think>, which is then forced; None is no limit.
        think_token_ids: ids of <think> and </think>; the default is that of the instruct models.
        max_thinking_tokens: the released models' budget: after so many new tokens without </think> it is forced,
            whether <think> was seen or not. Block diffusion places it before it denoises. None is no limit.
        end_think_token_id: id of </think> for max_thinking_tokens; None takes that of think_token_ids.
        streamer: receives tokens as they become final (see TokenStream).
    """

    max_new_tokens: int = 128
    block_length: int | None = None
    threshold: float | None = None
    causal_context: bool = True
    denoise_after_stop: bool = True
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    eos_token_id: int | Iterable[int] | None = None
    mask_token_id: int | None = None
    mask_groups: int | None = None
    verifier_weight: float = 1.0
    thinking_budget: int | None = None
    think_token_ids: tuple[int, int] = (12, 13)
    max_thinking_tokens: int | None = None
    end_think_token_id: int | None = None
    streamer: "BaseStreamer | None" = None

    def for_mode(self, mode: str) -> "DecodeOptions":
        """Return a copy with the default for whatever has no effect in `mode`, to decode in several modes alike."""
        return replace(self, **{name: getattr(DecodeOptions, name) for name in self.list_ineffective(mode)})

    def list_ineffective(self, mode: str) -> list[str]:
        """List the options that differ from their default and yet have no effect in `mode`."""
        ignored = [name for name, modes in MODES_THAT_READ.items() if mode not in modes]
        ignored += SAMPLING_OPTIONS if self.temperature == 0 else ()
        return [name for name in ignored if getattr(self, name) != getattr(DecodeOptions, name)]


@dataclass(frozen=True)
class DecodeResult:
    """One finished decode.

    Attributes:
        output_ids: [B, P + T], prompt and its padding included; a sequence that stopped early is filled up with the
            first stop id.
        num_new_tokens: of each sequence, up to and including its stop token.
        forwards: model calls by kind: prefill; step (AR); denoise, commit (block diffusion: one writes a full block and
            yields the next seed); draft, verify; draft_and_verify.
        num_positions: token positions that went through the layers, over all forwards and sequences.
        num_proposed: tokens predicted for masked positions, or drafted and verified.
        num_committed: proposed tokens that entered the output.
        acceptance_lengths: tokens emitted by each draft-verify cycle, bonus included; empty without speculation.
    """

    output_ids: "Tensor"
    num_new_tokens: list[int]
    forwards: dict[str, int]
    num_positions: int
    num_proposed: int
    num_committed: int
    acceptance_lengths: list[int]

    @property
    def num_forwards(self) -> int:
        """Model calls, including prefill, drafts, verifications and commits of blocks."""
        return sum(self.forwards.values())

    @property
    def tokens_per_forward(self) -> float:
        """New tokens of a sequence (mean over the batch) per model call; 1 for AR."""
        return sum(self.num_new_tokens) / len(self.num_new_tokens) / self.num_forwards

    @property
    def tokens_per_position(self) -> float:
        """New tokens per token position computed, prompts included."""
        return sum(self.num_new_tokens) / self.num_positions

    @property
    def commit_ratio(self) -> float | None:
        """Share of proposed tokens that entered the output; None without proposals."""
        return self.num_committed / self.num_proposed if self.num_proposed else None

    @property
    def num_cycles(self) -> int:
        """Draft-verify cycles, over all sequences."""
        return len(self.acceptance_lengths)

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens per draft-verify cycle; None without one."""
        return sum(self.acceptance_lengths) / self.num_cycles if self.acceptance_lengths else None

    def as_pair(self) -> tuple["Tensor", int]:
        """Return what the released models' entry points do: output_ids and the number of forwards."""
        return self.output_ids, self.num_forwards


def make_options(given: dict[str, Any]) -> DecodeOptions:
    """Build the options; raise TypeError for names that do not exist."""
    known = DecodeOptions.__dataclass_fields__
    if unknown := sorted(given.keys() - known.keys()):
        raise TypeError(f"there is no option {', '.join(unknown)}: these models take {', '.join(known)}")
    return DecodeOptions(**{name: _to_plain(name, value) for name, value in given.items()})


def _to_plain(name: str, value: Any) -> Any:
    """Return Python's own number for one of another library, such as numpy's; other values as they are."""
    if name in WHOLE_NUMBERS and _is_whole(value):
        return index(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool | int) else value


def check_options(config: Any, options: DecodeOptions) -> None:
    """Raise ValueError for values that no mode can serve; `config` is the model's."""
    _check_types(options)
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
    _check_verifier(options)
    _check_thinking(config, options)


def check_effect(mode: str, options: DecodeOptions) -> None:
    """Raise ValueError for an option that was given and has no effect in `mode`, or no effect without sampling."""
    for name in options.list_ineffective(mode):
        if mode in MODES_THAT_READ.get(name, MODES):
            raise ValueError(f"{name} has no effect at temperature 0: give a temperature above 0, or leave {name} out")
        modes = " or ".join(MODES_THAT_READ[name])
        raise ValueError(f"{name} has no effect in mode {mode}: leave it out, or choose mode {modes}")


def _check_types(options: DecodeOptions) -> None:
    types: list[tuple[str, Any, str]] = [(name, int, "a whole number") for name in WHOLE_NUMBERS]
    types += [(name, (int, float), "a number") for name in ("temperature", "threshold", "top_p", "verifier_weight")]
    for name, expected, what in types:
        value = getattr(options, name)
        may_be_none = name not in ("max_new_tokens", "temperature", "verifier_weight")
        if isinstance(value, bool) or not (isinstance(value, expected) or (value is None and may_be_none)):
            raise ValueError(f"{name} is {value!r}; it must be {what}")


def _check_block_length(config: Any, block_length: int | None) -> None:
    if block_length is not None and block_length < 1:
        raise ValueError(f"block_length is {block_length}; it must be at least 1, and 1 decodes token by token")
    if block_length is not None and block_length > config.max_position_embeddings:
        raise ValueError(
            f"block_length is {block_length}; the model has no more than {config.max_position_embeddings} positions"
        )


def _check_verifier(options: DecodeOptions) -> None:
    if not 0 <= options.verifier_weight <= 1:
        raise ValueError(f"verifier_weight is {options.verifier_weight}; it must be from 0 to 1 (AR alone verifies)")
    if options.verifier_weight < 1 and options.mask_groups is not None:
        raise ValueError(
            f"verifier_weight {options.verifier_weight} needs the masks after every drafted token, mask_groups leaves "
            "some out: give one of the two"
        )


def _check_thinking(config: Any, options: DecodeOptions) -> None:
    if options.thinking_budget is not None and options.max_thinking_tokens is not None:
        raise ValueError(
            "thinking_budget and max_thinking_tokens count thinking differently: give one of them (see DecodeOptions)"
        )
    if options.thinking_budget is not None and options.end_think_token_id is not None:
        raise ValueError("end_think_token_id belongs to max_thinking_tokens: with thinking_budget give think_token_ids")
    for name in ("thinking_budget", "max_thinking_tokens"):
        budget = getattr(options, name)
        if budget is not None and budget < 0:
            raise ValueError(f"{name} is {budget}; it must be 0 or more, or None for no limit")
    if options.thinking_budget is not None:
        _check_can_be_decoded("think_token_ids", options.think_token_ids, config, options)
    if options.max_thinking_tokens is not None:
        _check_can_be_decoded("end_think_token_id", (resolve_end_think(options),), config, options)


def _check_can_be_decoded(name: str, token_ids: tuple[int, ...], config: Any, options: DecodeOptions) -> None:
    mask_token_id = resolve_mask_token_id(config, options.mask_token_id)
    for token_id in token_ids:
        if not 0 <= token_id < config.vocab_size or token_id == mask_token_id:
            raise ValueError(f"{name} holds {token_id}, which is no token that can be decoded")


def resolve_end_think(options: DecodeOptions) -> int:
    """Return the id of </think> that max_thinking_tokens forces."""
    return options.think_token_ids[1] if options.end_think_token_id is None else options.end_think_token_id


def resolve_block_length(config: Any, options: DecodeOptions) -> int:
    """Return the tokens of a block, by default the config's block_size."""
    return config.block_size if options.block_length is None else options.block_length


def resolve_mask_token_id(config: Any, mask_token_id: int | None = None) -> int:
    """Return the given id, else the config's; raise ValueError if it is outside the vocabulary."""
    resolved = config.mask_token_id if mask_token_id is None else mask_token_id
    if not 0 <= resolved < config.vocab_size:
        raise ValueError(f"mask_token_id {resolved} is outside the vocabulary 0..{config.vocab_size - 1}")
    return resolved


def resolve_stop_ids(model: Any, eos_token_id: Any) -> tuple[int, ...]:
    """Return the ids that end a sequence: those given, else of generation_config.json, else of config.json.

    eos_token_id: an int, several ints, or a tensor of either; None if not given. No ids ([]) means never, as does -1.
    """
    eos = eos_token_id
    for source in (getattr(model, "generation_config", None), model.config):
        eos = getattr(source, "eos_token_id", None) if eos is None else eos
    if eos is None:
        return ()
    if hasattr(eos, "tolist"):
        eos = eos.tolist()
    ids: list[Any] = list(eos) if isinstance(eos, Iterable) and not isinstance(eos, str) else [eos]
    if not all(_is_whole(token_id) for token_id in ids):
        raise ValueError(f"eos_token_id is {eos!r}; it must be one or several token ids, or -1 to never stop")
    stop_ids = tuple(index(token_id) for token_id in ids)
    return () if stop_ids == (NEVER_STOP,) else stop_ids


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def check_stop_ids(stop_ids: tuple[int, ...], vocab_size: int, mask_token_id: int) -> None:
    """Raise ValueError for ids that are never chosen, at which no sequence would stop."""
    for stop_id in stop_ids:
        if not 0 <= stop_id < vocab_size:
            raise ValueError(f"eos_token_id {stop_id} is outside the vocabulary 0..{vocab_size - 1}")
        if stop_id == mask_token_id:
            raise ValueError(f"eos_token_id {stop_id} is the mask token, which is never chosen")

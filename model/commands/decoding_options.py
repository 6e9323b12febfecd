"""Command-line options for decoding, and which of them exclude each other. Chat and the evaluations use them."""

import argparse
import math
from collections.abc import Collection

from conf.system.entry import count
from conf.system.errors import UserError
from model.hf.options import AR, BLOCK_DIFFUSION, BLOCK_DIFFUSION_THRESHOLD, QUADRATIC


def add_length_options(group: argparse._ArgumentGroup, max_new_tokens: int) -> None:
    """Add --max-new-tokens with its default, and --block-length."""
    group.add_argument("--max-new-tokens", type=count, default=max_new_tokens, metavar="N", help="default: %(default)s")
    group.add_argument("--block-length", type=count, metavar="N", help="default: block_size of the checkpoint")


def add_choice_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that decide how tokens are chosen: threshold, sampling, mask groups, thinking budget.

    An option that the user leaves out is None; --temperature is then 0.
    """
    group.add_argument(
        "--threshold",
        type=probability,
        metavar="P",
        help="block_diffusion: commit tokens at least this probable (default 0.9); linear, quadratic: end a draft "
        "before a less probable token (default 0: never)",
    )
    group.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="default: 0, greedy")
    group.add_argument("--top-k", type=count, metavar="N", help="sample from the N most probable tokens")
    group.add_argument(
        "--top-p", type=positive_probability, metavar="P", help="sample from the fewest tokens that together reach P"
    )
    group.add_argument("--seed", type=seed, metavar="N", help="seed of sampling; without it every run differs")
    group.add_argument(
        "--mask-groups", type=count, metavar="N", help="quadratic: mask groups computed per forward; default: all"
    )
    group.add_argument(
        "--thinking-budget", type=non_negative, metavar="N", help="most tokens spent on thinking; default: no limit"
    )


def add_place_options(group: argparse._ArgumentGroup) -> None:
    """Add --device and --dtype."""
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    group.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")


def choose_threshold(mode: str, threshold: float | None) -> float | None:
    """Return the threshold that was given, else the one a command takes: 0.9 in block diffusion, none in other modes.

    Without any, block diffusion commits one position per forward, as the released models do.
    """
    return BLOCK_DIFFUSION_THRESHOLD if threshold is None and mode == BLOCK_DIFFUSION else threshold


def check_sampling(options: argparse.Namespace) -> None:
    """Refuse sampling options with greedy decoding, where they have no effect. Raises: UserError."""
    for name in ("top_k", "top_p", "seed"):
        if options.temperature == 0 and getattr(options, name) is not None:
            raise UserError(f"{_flag(name)} has no effect without --temperature: add it, or leave {_flag(name)} out")


def check_modes(options: argparse.Namespace, modes: Collection[str], *ignored_by_ar: str) -> None:
    """Refuse options that have no effect in any of `modes`. Raises: UserError.

    Args:
        options: the parsed command line.
        modes: the decoding modes that will run.
        *ignored_by_ar: further options that AR ignores, in addition to --threshold and --mask-groups.
    """
    for name in ("threshold", *ignored_by_ar):
        if set(modes) == {AR} and getattr(options, name) not in (None, ()):
            raise UserError(f"{_flag(name)} has no effect in mode {AR}: leave it out, or choose another mode")
    if options.mask_groups is not None and QUADRATIC not in modes:
        raise UserError(f"--mask-groups only affects mode {QUADRATIC}: leave it out, or choose that mode")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def seed(text: str) -> int:
    """Parse a seed that torch accepts."""
    value = int(text)
    if not -(1 << 63) <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{value} is too large: it must fit into 64 bits")
    return value


def probability(text: str) -> float:
    """Parse a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability: it must be between 0 and 1")
    return value


def positive_probability(text: str) -> float:
    """Parse a number above 0, up to 1."""
    value = probability(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 leaves no token to choose: it must be above 0")
    return value


def non_negative(text: str) -> int:
    """Parse a count that may be zero."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least 0")
    return value


def temperature(text: str) -> float:
    """Parse a sampling temperature: 0 for greedy decoding, or a positive number."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a temperature: it must be 0 (greedy) or positive")
    return value

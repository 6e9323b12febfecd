"""Options of command lines that decode, and which of them contradict each other: chat and evaluations. No torch."""

import argparse
from collections.abc import Collection

from conf.system.entry import count
from conf.system.errors import UserError
from model.evaluate.records import AR, QUADRATIC
from model.export.option_types import block_length, positive_probability, probability, seed, temperature, whole


def add_length_options(group: argparse._ArgumentGroup, max_new_tokens: int) -> None:
    """--max-new-tokens with its default, --block-length."""
    group.add_argument("--max-new-tokens", type=count, default=max_new_tokens, metavar="N", help="default: %(default)s")
    group.add_argument("--block-length", type=block_length, metavar="N", help="default: block_size of the checkpoint")


def add_choice_options(group: argparse._ArgumentGroup) -> None:
    """How tokens are chosen: threshold, sampling, groups of masks, thinking. What is not given is None or 0."""
    group.add_argument(
        "--threshold",
        type=probability,
        metavar="P",
        help="block_diffusion: commit tokens this probable (default 0.9); linear, quadratic: end drafts before less "
        "probable ones (default 0: never)",
    )
    group.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="default: 0, greedy")
    group.add_argument("--top-k", type=count, metavar="N", help="sample from the N best tokens")
    group.add_argument("--top-p", type=positive_probability, metavar="P", help="sample from the fewest that hold P")
    group.add_argument("--seed", type=seed, metavar="N", help="of sampling; without it every run differs")
    group.add_argument(
        "--mask-groups", type=count, metavar="N", help="quadratic: groups of masks per forward; default: all"
    )
    group.add_argument(
        "--thinking-budget", type=whole, metavar="N", help="tokens of thinking at most; default: no limit"
    )


def add_place_options(group: argparse._ArgumentGroup) -> None:
    """--device, --dtype."""
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    group.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")


def check_sampling(options: argparse.Namespace) -> None:
    """Raises: UserError for options of sampling beside greedy decoding, where they would have no effect."""
    for name in ("top_k", "top_p", "seed"):
        if options.temperature == 0 and getattr(options, name) is not None:
            raise UserError(f"{_spell(name)} has no effect without --temperature: add it, or leave it out")


def check_modes(options: argparse.Namespace, modes: Collection[str], *beside_ar: str) -> None:
    """Raises: UserError for options that have no effect in any of `modes`.

    beside_ar: options that AR ignores, beside --threshold and --mask-groups.
    """
    for name in ("threshold", *beside_ar):
        if set(modes) == {AR} and getattr(options, name) not in (None, ()):
            raise UserError(f"{_spell(name)} has no effect in mode {AR}: leave it out, or choose another mode")
    if options.mask_groups is not None and QUADRATIC not in modes:
        raise UserError(f"--mask-groups has an effect in mode {QUADRATIC} alone: leave it out, or choose that mode")


def _spell(name: str) -> str:
    return f"--{name.replace('_', '-')}"

"""Types of command-line options of decoding, for argparse. No torch."""

import argparse
import math


def seed(text: str) -> int:
    """A seed that torch takes."""
    value = int(text)
    if not -(1 << 63) <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{value} is too large: it must fit into 64 bits")
    return value


def probability(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no probability: it must be between 0 and 1")
    return value


def positive_probability(text: str) -> float:
    """A number above 0, up to 1."""
    value = probability(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 leaves no token to choose: it must be above 0")
    return value


def whole(text: str) -> int:
    """A number of things, perhaps none."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least 0")
    return value


def block_length(text: str) -> int:
    """Tokens of a block: the seed and at least one."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} leaves nothing to draft beside the seed: it must be at least 2")
    return value


def temperature(text: str) -> float:
    """0 for greedy decoding, or a positive number."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: it must be 0 (greedy) or positive")
    return value

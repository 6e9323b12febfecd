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


def temperature(text: str) -> float:
    """0 for greedy decoding, or a positive number."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: it must be 0 (greedy) or positive")
    return value

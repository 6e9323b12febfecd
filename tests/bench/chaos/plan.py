"""Draw from a seed what is killed, how and when, so that a bad ending can be repeated.

A moment is a thing that shows in the run folder plus a delay: a start-up that has begun, a checkpoint folder that
appears, a step that is written down. Delays are drawn as shares of how long the thing lasts.
"""

import random
from dataclasses import dataclass
from enum import Enum
from signal import Signals

SIGNALS = (Signals.SIGKILL, Signals.SIGTERM, Signals.SIGUSR1, Signals.SIGINT)
LAUNCHER = -1  # the place of a rank: the process that started the ranks
MOST_STEPS = 6  # between a start and the kill that waits for steps


class Moment(Enum):
    """Name what a kill waits for; where it really struck is observed, see watch.Phase."""

    start = "start"  # interpreters, imports, rendezvous
    load = "load"  # model, checkpoint
    step = "step"
    save = "save"
    evaluation = "evaluation"


# Saves are where most can go wrong.
WEIGHTS = {Moment.start: 15, Moment.load: 15, Moment.step: 25, Moment.save: 30, Moment.evaluation: 15}


@dataclass(frozen=True)
class Kill:
    """Describe one kill.

    rank: which process, LAUNCHER for the launcher. steps: to be done first, at moment `step`. delay: share of the
    moment, 0 to 1. asynchronous: how this start saves.
    """

    rank: int
    signal: Signals
    moment: Moment
    steps: int
    delay: float
    asynchronous: bool


def draw_kills(count: int, seed: int, num_ranks: int) -> list[Kill]:
    """Draw the kills in order; the same for the same arguments."""
    source = random.Random(seed)
    return [_draw(source, num_ranks) for _ in range(count)]


def _draw(source: random.Random, num_ranks: int) -> Kill:
    moments = list(WEIGHTS)
    return Kill(
        rank=source.choice([*range(num_ranks), *range(num_ranks), LAUNCHER]),
        signal=source.choice(SIGNALS),
        moment=source.choices(moments, [WEIGHTS[moment] for moment in moments])[0],
        steps=source.randint(1, MOST_STEPS),
        delay=source.random(),
        asynchronous=source.random() < 0.5,
    )

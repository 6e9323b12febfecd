"""Which command an override of the quickstart is for."""

from dataclasses import dataclass

DRAFTER_PREFIX = "drafter."


@dataclass(frozen=True)
class Overrides:
    """stages: of the training stages, as pretrain.train knows them. drafter: of the draft adapter, as lora.train does.

    Both commands have keys the other one lacks (train.tokens, train.steps), and keys of the same name that are tuned
    apart (train.global_batch_size, evaluation.every_steps): nothing is guessed, an override of the drafter says so.
    """

    stages: list[str]
    drafter: list[str]


def split_overrides(words: list[str]) -> Overrides:
    """`drafter.train.steps=10` is `train.steps=10` of the drafter; everything else is for the stages."""
    drafter = [word.removeprefix(DRAFTER_PREFIX) for word in words if word.startswith(DRAFTER_PREFIX)]
    return Overrides([word for word in words if not word.startswith(DRAFTER_PREFIX)], drafter)

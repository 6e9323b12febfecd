"""Everything a resumed run continues from, beside weights and optimizer state (which megatron-core saves)."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """step: optimizer steps done. tokens_seen: clean tokens trained on. samples_seen: sequences trained on.

    samples_seen is also the global sample index of the next sequence: data order and noise are functions of it, and
    the learning rate is one of tokens_seen. No random state is consumed after the weights are drawn.
    """

    step: int = 0
    tokens_seen: int = 0
    samples_seen: int = 0

    def advance(self, num_sequences: int, sequence_length: int) -> None:
        """Counts one optimizer step."""
        self.step += 1
        self.samples_seen += num_sequences
        self.tokens_seen += num_sequences * sequence_length

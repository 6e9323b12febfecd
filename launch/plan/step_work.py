"""Count what one optimizer step computes: positions, attended pairs and useful FLOPs (pretrain/costs.py)."""

from dataclasses import dataclass

from conf.schema import Objective, RunConfig
from pretrain.costs import StepFlops, count_attended_pairs, count_step_flops


@dataclass(frozen=True)
class StepWork:
    """Counts one step of the global batch.

    tokens: clean ones. positions: of all forwards. attended_pairs: (query, key) pairs that the mask allows.
    scored_positions: expected number if every token is scored (of chats only responses are). flops: useful ones,
    forward and backward.
    """

    tokens: int
    positions: int
    attended_pairs: int
    scored_positions: float
    flops: StepFlops

    @property
    def total_flops(self) -> float:
        """FLOPs of all parts."""
        return sum(self.flops)

    @property
    def flops_per_token(self) -> float:
        """FLOPs per clean token."""
        return self.total_flops / self.tokens


def count_work(config: RunConfig, document_tokens: int | None = None) -> StepWork:
    """Count the work of a configuration.

    document_tokens: length of every document except the last of a sequence; None: one document per sequence.
    """
    doubled = config.stage.objective is Objective.joint
    sequences, length = config.train.global_batch_size, config.data.sequence_length
    documents = split_into_documents(config, document_tokens)
    by_document = (count_attended_pairs(tokens, config.stage.block_size, doubled) for tokens in documents)
    attended_pairs = sequences * sum(by_document)
    tokens = config.tokens_per_step
    positions = tokens * config.stage.positions_per_token
    # Nothing precedes a document's first token that could predict it. Masking probabilities are uniform.
    masked = length * (1 + config.stage.noise_epsilon) / 2 if doubled else 0
    scored = sequences * (length - len(documents) + masked)
    flops = count_step_flops(config.model, positions, attended_pairs, round(scored))
    return StepWork(tokens, positions, attended_pairs, scored, flops)


def split_into_documents(config: RunConfig, document_tokens: int | None) -> list[int]:
    """Return the lengths of a sequence's documents, as attention sees them."""
    length = config.data.sequence_length
    if document_tokens is None or not config.data.isolate_documents:
        return [length]
    whole, rest = divmod(length, document_tokens)
    return [document_tokens] * whole + ([rest] if rest else [])

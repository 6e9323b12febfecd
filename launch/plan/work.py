"""What one optimizer step computes: rows, pairs that attend, and useful FLOPs (pretrain/reporting/flops.py)."""

from dataclasses import dataclass

from conf.schema import Objective, RunConfig
from pretrain.reporting.flops import StepFlops, count_document_pairs, count_step_flops


@dataclass(frozen=True)
class StepWork:
    """One step of the global batch.

    tokens: clean ones. rows: of all forwards. pairs: rows that see each other. scored_rows: expected, with every token
    scored (chats score answers alone). flops: useful ones, forward and backward.
    """

    tokens: int
    rows: int
    pairs: int
    scored_rows: float
    flops: StepFlops

    @property
    def total_flops(self) -> float:
        """Of all parts."""
        return sum(self.flops)

    @property
    def flops_per_token(self) -> float:
        """Per clean token."""
        return self.total_flops / self.tokens


def count_work(config: RunConfig, document_tokens: int | None = None) -> StepWork:
    """document_tokens: length of every document but a sequence's last; None is one document per sequence."""
    doubled = config.stage.objective is Objective.joint
    sequences, length = config.train.global_batch_size, config.data.sequence_length
    documents = split_into_documents(config, document_tokens)
    pairs = sequences * sum(count_document_pairs(tokens, config.stage.block_size, doubled) for tokens in documents)
    tokens = config.tokens_per_step
    rows = tokens * config.stage.positions_per_token
    # A document's first token has no row before it. Masking probabilities are uniform in [epsilon, 1].
    masked = length * (1 + config.stage.noise_epsilon) / 2 if doubled else 0
    scored = sequences * (length - len(documents) + masked)
    return StepWork(tokens, rows, pairs, scored, count_step_flops(config.model, rows, pairs, round(scored)))


def split_into_documents(config: RunConfig, document_tokens: int | None) -> list[int]:
    """Lengths of a sequence's documents, as attention sees them."""
    length = config.data.sequence_length
    if document_tokens is None or not config.data.isolate_documents:
        return [length]
    whole, rest = divmod(length, document_tokens)
    return [document_tokens] * whole + ([rest] if rest else [])

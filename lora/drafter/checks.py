"""What must fit together before a draft adapter is trained, once the checkpoint is known."""

from typing import Any

from conf.schema.drafter import DrafterConfig
from conf.system.errors import UserError


def check_lengths(config: DrafterConfig, block_size: int, max_positions: int) -> None:
    """Raises: UserError if sequences do not fit the model, or blocks not the sequences."""
    length = config.train.sequence_length
    if length + block_size > max_positions:
        raise UserError(
            f"train.sequence_length={length} and a drafted block of {block_size} exceed the {max_positions} positions "
            f"of {config.checkpoint}: give train.sequence_length={max_positions - block_size} or less"
        )
    if not 1 < block_size < length:
        raise UserError(
            f"a block of {block_size} tokens (block_size, by default the checkpoint's) does not fit sequences of "
            f"train.sequence_length={length}: give a block_size between 2 and {length - 1}, or longer sequences"
        )


def check_rank(config: DrafterConfig, model: Any) -> None:
    """Raises: UserError if the adapter would have more rank than o_proj. model: the checkpoint's configuration."""
    largest = min(model.hidden_size, model.num_attention_heads * model.head_dim)
    if config.adapter.rank > largest:
        raise UserError(
            f"adapter.rank={config.adapter.rank} is above the rank of o_proj itself: give at most {largest} for "
            f"{config.checkpoint}"
        )

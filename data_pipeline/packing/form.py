"""Define the form of training sequences, whatever they are made of."""

from dataclasses import dataclass

from conf.schema import DataConfig, OverlongChat
from conf.system.errors import UserError


@dataclass(frozen=True)
class SequenceForm:
    """Says what a training sequence looks like. sequence_length: S. block_size: tokens of a diffusion block.

    alignment: documents and responses start at its multiples: block_size where blocks are noised, 1 where not.
    isolate_documents, block_padding_loss, overlong_chats: as in conf.schema.DataConfig.
    """

    sequence_length: int
    block_size: int
    alignment: int
    isolate_documents: bool = True
    block_padding_loss: bool = True
    overlong_chats: OverlongChat = OverlongChat.truncate

    def __post_init__(self) -> None:
        if self.sequence_length % self.block_size:
            raise UserError(
                f"sequence_length {self.sequence_length} is not a multiple of block_size {self.block_size}."
            )
        assert self.block_size % self.alignment == 0


def build_sequence_form(data: DataConfig, block_size: int, has_noise: bool) -> SequenceForm:
    """Return the form a stage needs; without noise (AR) documents follow each other without any padding."""
    return SequenceForm(
        data.sequence_length,
        block_size,
        block_size if has_noise else 1,
        data.isolate_documents,
        data.block_padding_loss,
        data.overlong_chats,
    )

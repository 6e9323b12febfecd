"""What the parent and its workers send each other, besides shards.Job and shards.Advance."""

from dataclasses import dataclass

from data_pipeline.prepare.plan import Part


@dataclass(frozen=True)
class TokenizeTask:
    """Tokenise a part from shard `piece` and row `skip` on; see shards.tokenize_part."""

    part: Part
    piece: int
    skip: int


@dataclass(frozen=True)
class Done:
    """A task is done."""


@dataclass(frozen=True)
class Failed:
    """message: for users if is_user_error, else a traceback."""

    message: str
    is_user_error: bool

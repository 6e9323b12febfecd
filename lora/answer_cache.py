"""Answers on disk: a folder per model, prompts and settings, and in it one file per shard of prompts.

The folder's name is a hash of everything that decides the answers, which its settings.json spells out, so answers of
another model or other settings are never taken for these. A shard appears complete or not at all.
"""

import io
import json
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from conf.system.atomic import atomic_write_bytes, atomic_write_text
from conf.system.errors import UserError
from lora.examples import hash_values

NAME_CHARACTERS = 16
SETTINGS_NAME = "settings.json"


@dataclass(frozen=True)
class AnswerShard:
    """Answered prompts, one after another.

    examples: [p] int64, number of each prompt among all. prompt_lengths, lengths: [p] int64, tokens of the prompt, and
    of prompt and answer. tokens: [sum(lengths)] int32, prompts and answers.
    """

    examples: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray


class AnswerCache:
    """The answers under `parent` that `settings` (JSON values) decide. identity: their hash."""

    def __init__(self, parent: Path, settings: dict[str, Any]) -> None:
        self.identity = hash_values(settings)
        self.folder = parent / f"answers_{self.identity[:NAME_CHARACTERS]}"
        self._settings = settings

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"shard_{shard:05d}.npz"

    def save(self, shard: int, answers: AnswerShard) -> None:
        """Write a shard. Raises: UserError if the folder cannot be written."""
        buffer = io.BytesIO()
        np.savez(buffer, **{item.name: getattr(answers, item.name) for item in fields(AnswerShard)})
        try:
            if not (self.folder / SETTINGS_NAME).exists():
                atomic_write_text(self.folder / SETTINGS_NAME, json.dumps(self._settings, indent=2) + "\n")
            atomic_write_bytes(self.path(shard), buffer.getvalue())
        except OSError as error:
            raise UserError(
                f"answers cannot be written to {self.folder} ({error.strerror}): make room or set answers.cache to "
                "another folder; what is complete stays"
            ) from error

    def load(self, shard: int, examples: np.ndarray) -> AnswerShard:
        """Read a shard. examples: [p] the numbers that its prompts must be of.

        Raises: UserError if it is not there, damaged, or holds other prompts.
        """
        path = self.path(shard)
        try:
            with np.load(path, allow_pickle=False) as content:
                found = AnswerShard(**{item.name: content[item.name] for item in fields(AnswerShard)})
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: the prompts are not all answered; run the command again") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and it is made again") from error
        if not np.array_equal(found.examples, examples) or found.lengths.sum() != len(found.tokens):
            raise UserError(f"{path} holds answers to other prompts: delete it, and it is made again")
        return found

"""Responses on disk: a folder per model, prompts and settings, and in it one file per shard of prompts.

The folder's name is a hash of everything that decides the responses, which its settings.json spells out. So responses
of another model or with other settings are never mistaken for these. A shard appears complete or not at all.
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
from lora.examples.example_set import hash_values

NAME_CHARACTERS = 16
SETTINGS_NAME = "settings.json"
# The names under which earlier versions wrote, so that their responses are found.
RUN_CACHE_FOLDER, FOLDER_PREFIX = "answers", "answers_"


@dataclass(frozen=True)
class ResponseShard:
    """Prompts with their responses, one after another.

    examples: [p] int64, number of each prompt among all. prompt_lengths, lengths: [p] int64, tokens of the prompt, and
    of prompt and response. tokens: [sum(lengths)] int32, prompts and responses.
    """

    examples: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray


class ResponseCache:
    """The folder under `parent` with the responses that `settings` (JSON values) decide. identity: their hash."""

    def __init__(self, parent: Path, settings: dict[str, Any]) -> None:
        self.identity = hash_values(settings)
        self.folder = parent / f"{FOLDER_PREFIX}{self.identity[:NAME_CHARACTERS]}"
        self._settings = settings

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"shard_{shard:05d}.npz"

    def save(self, shard: int, responses: ResponseShard) -> None:
        """Write a shard. Raises: UserError if the folder cannot be written."""
        buffer = io.BytesIO()
        np.savez(buffer, **{item.name: getattr(responses, item.name) for item in fields(ResponseShard)})
        try:
            if not (self.folder / SETTINGS_NAME).exists():
                atomic_write_text(self.folder / SETTINGS_NAME, json.dumps(self._settings, indent=2) + "\n")
            atomic_write_bytes(self.path(shard), buffer.getvalue())
        except OSError as error:
            raise UserError(
                f"responses cannot be written to {self.folder} ({error.strerror}): make room or set responses.cache to "
                "another folder; what is complete stays"
            ) from error

    def load(self, shard: int, examples: np.ndarray) -> ResponseShard:
        """Read a shard. examples: [p] the expected numbers of its prompts.

        Raises: UserError if it is not there, damaged, or holds other prompts.
        """
        path = self.path(shard)
        try:
            with np.load(path, allow_pickle=False) as content:
                found = ResponseShard(**{item.name: content[item.name] for item in fields(ResponseShard)})
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist: some prompts have no response yet; run the command again"
            ) from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): delete it, and it is decoded again") from error
        if not np.array_equal(found.examples, examples) or found.lengths.sum() != len(found.tokens):
            raise UserError(f"{path} holds responses to other prompts: delete it, and it is decoded again")
        return found

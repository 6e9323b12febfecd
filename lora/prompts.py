"""What the model is asked to answer: beginnings of tokenised examples, or rows that a user wrote as prompts."""

import hashlib
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import DocumentKind
from conf.system.errors import UserError
from data_pipeline.chat.template import load_chat_template
from data_pipeline.prepare.inputs import is_saved_dataset, list_input_files
from lora.examples import Example, StoredExamples, hash_tokens, hash_values
from lora.rows import is_tokenised, name_own_keys, read_checkpoint_value
from model.commands.prompt_records import encode_prompt_record, read_prompt_records, refuse_mask_token
from model.export.load import check_vocabulary, load_export_tokenizer

SUFFIX = ".jsonl"
logger = logging.getLogger(__name__)


class PromptSet(ABC):
    """Prompts by number.

    sequence_length: tokens of a prompt and its answer at most. lengths: [n] int64, tokens of each prompt; 0 where a
    number has none. identity: JSON values that decide the prompts and their order.
    """

    sequence_length: int
    lengths: np.ndarray
    identity: dict[str, Any]

    @abstractmethod
    def read(self, number: int) -> np.ndarray:
        """[lengths[number]] int64, the tokens of a prompt."""


class ExamplePrompts(PromptSet):
    """Of a chat the context of the last answer that begins within the example, of a text its first `prompt_tokens`
    tokens if more follow."""

    def __init__(self, examples: StoredExamples, prompt_tokens: int) -> None:
        is_text = examples.kind is DocumentKind.text
        self.sequence_length, self._examples = examples.sequence_length, examples
        self.identity = {"examples": examples.fingerprint, "prompt_tokens": prompt_tokens if is_text else None}
        found = [_find_room(e, prompt_tokens) if is_text else _find_last_context(e) for e in examples]
        self.lengths = np.array(found, dtype=np.int64)

    def read(self, number: int) -> np.ndarray:
        return self._examples[number].tokens[: self.lengths[number]]


class RowPrompts(PromptSet):
    """A prompt per row; all of their tokens are in memory.

    tokens: [sum(lengths)] int32, one prompt after another. lengths: [n] int64, all of them positive.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, sequence_length: int) -> None:
        self.sequence_length, self.lengths = sequence_length, lengths
        self._tokens, self._ends = tokens, np.cumsum(lengths)
        content = hashlib.sha256(lengths.astype("<i8").tobytes() + tokens.astype("<i4").tobytes()).hexdigest()
        self.identity = {"examples": hash_values("rows", content, sequence_length), "prompt_tokens": None}

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> np.ndarray:
        end = int(self._ends[number])
        return self._tokens[end - int(self.lengths[number]) : end].astype(np.int64)

    def select(self, chosen: np.ndarray, name: str) -> "RowPrompts":
        """The prompts where `chosen` [n] bool. name: not needed, their content tells them apart."""
        del name
        tokens = self._tokens[np.repeat(chosen, self.lengths)]
        return RowPrompts(tokens, self.lengths[chosen], self.sequence_length)

    def hash_documents(self) -> np.ndarray:
        """[n] uint64, of every prompt a hash of its tokens."""
        return np.array([hash_tokens(self.read(number)) for number in range(len(self))], dtype=np.uint64)


def find_prompt_files(path: Path | str) -> list[Path]:
    """The .jsonl files of `path` (a file, a folder or a glob); none if it holds tokens or rows in another format.

    Raises: UserError if there is nothing.
    """
    given = Path(path).expanduser()
    if is_tokenised(given) or is_saved_dataset(given):
        return []
    files = list_input_files(str(path))
    return [file.path for file in files] if all(file.suffix == SUFFIX for file in files) else []


def open_row_prompts(
    files: Sequence[Path],
    *,
    checkpoint: Path,
    sequence_length: int,
    prompt_tokens: int,
    chat_template: str | None = None,
) -> RowPrompts:
    """One prompt of every row (see model.prompt_rows) that leaves room for a token of an answer.

    prompt_tokens: of a text. chat_template: as DrafterConfig.chat_template; only its generation prompt is needed, so
    it need not mark answers. Raises: UserError naming the row that is no prompt, or if no prompt is left.
    """
    tokenizer = load_export_tokenizer(checkpoint)
    check_vocabulary(checkpoint, tokenizer, read_checkpoint_value(checkpoint, "vocab_size"))
    if chat_template is not None:
        with name_own_keys():
            tokenizer.chat_template = load_chat_template(checkpoint, chat_template)
    mask_token_id = read_checkpoint_value(checkpoint, "mask_token_id")
    tokens, lengths, num_rows = array("i"), array("q"), 0
    for file in files:
        for place, row in read_prompt_records(file):
            prompt = encode_prompt_record(row, place, tokenizer, prompt_tokens=prompt_tokens)
            refuse_mask_token(prompt, place, mask_token_id)
            num_rows += 1
            if len(prompt) < sequence_length:
                tokens.extend(prompt)
                lengths.append(len(prompt))
    _say_what_is_left(files, len(lengths), num_rows, sequence_length)
    return RowPrompts(np.array(tokens, np.int32), np.array(lengths, np.int64), sequence_length)


def _say_what_is_left(files: Sequence[Path], kept: int, num_rows: int, sequence_length: int) -> None:
    """Raises: UserError if no prompt is."""
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} other files"
    limit = f"train.sequence_length={sequence_length}"
    if not num_rows:
        raise UserError(f"there are no prompts in {where}: give one JSON object per line")
    if not kept:
        raise UserError(
            f"{where}: no prompt leaves room for an answer, for none has less than {limit} tokens: raise it or give "
            "shorter prompts"
        )
    logger.info("%s: %d prompts", where, kept)
    if kept < num_rows:
        left_out = num_rows - kept
        logger.warning("%d of %d prompts leave no room for an answer within %s: left out", left_out, num_rows, limit)


def _find_room(example: Example, prompt_tokens: int) -> int:
    """Tokens of a text's prompt; 0 if nothing would follow it."""
    return prompt_tokens if len(example.tokens) > prompt_tokens else 0


def _find_last_context(example: Example) -> int:
    """Tokens of a chat before its last answer."""
    begins_answer = example.drafted & ~np.append(False, example.drafted[:-1])
    return int(np.flatnonzero(begins_answer)[-1])

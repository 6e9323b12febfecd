"""The prompts that the model responds to: beginnings of tokenised examples, or records that a user wrote as prompts."""

import hashlib
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, override

import numpy as np

from conf.schema import DocumentKind
from conf.system.errors import UserError
from data_pipeline.chat.template import load_chat_template
from data_pipeline.prepare.inputs import is_saved_dataset, list_input_files
from lora.examples.example_set import Example, hash_tokens, hash_values
from lora.examples.records import is_tokenised, name_own_keys, read_checkpoint_value
from lora.examples.stored_examples import StoredExamples
from model.commands.prompt_records import encode_prompt_record, read_prompt_records, refuse_mask_token
from model.export.images import PromptImage, load_image_reader
from model.export.load import check_vocabulary, load_export_tokenizer

PROMPT_SUFFIX = ".jsonl"
logger = logging.getLogger(__name__)


class PromptSet(ABC):
    """Prompts by number.

    sequence_length: tokens of a prompt and its response at most. lengths: [n] int64, tokens of each prompt; 0 if a
    number has none. identity: JSON values that decide the prompts and their order.
    """

    sequence_length: int
    lengths: np.ndarray
    identity: dict[str, Any]

    @abstractmethod
    def read(self, number: int) -> np.ndarray:
        """Return [lengths[number]] int64, the tokens of a prompt."""

    def read_images(self, number: int) -> tuple[PromptImage, ...]:
        """Return the images of a prompt in the order of their tokens."""
        del number
        return ()


class ExamplePrompts(PromptSet):
    """Prompts that are beginnings of examples.

    The prompt of a text is its first `prompt_tokens` tokens, if more follow. The prompt of a chat is everything before
    the last response that begins within the example.
    """

    def __init__(self, examples: StoredExamples, prompt_tokens: int) -> None:
        is_text = examples.kind is DocumentKind.text
        self.sequence_length, self._examples = examples.sequence_length, examples
        self.identity = {"examples": examples.fingerprint, "prompt_tokens": prompt_tokens if is_text else None}
        found = [_measure_text_prompt(e, prompt_tokens) if is_text else _measure_chat_prompt(e) for e in examples]
        self.lengths = np.array(found, dtype=np.int64)

    @override
    def read(self, number: int) -> np.ndarray:
        return self._examples[number].tokens[: self.lengths[number]]

    @override
    def read_images(self, number: int) -> tuple[PromptImage, ...]:
        return self._examples[number].images  # all of them stand before the last response


class RecordPrompts(PromptSet):
    """Prompts that are records of their own; all of their tokens are in memory.

    tokens: [sum(lengths)] int32, one prompt after another. lengths: [n] int64, all of them positive. images: of the
    prompts that have any, by number; their pixels are not in memory.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        sequence_length: int,
        images: Mapping[int, tuple[PromptImage, ...]] = MappingProxyType({}),
    ) -> None:
        self.sequence_length, self.lengths = sequence_length, lengths
        self._images = images
        self._image_hashes = {number: [image.hash() for image in own] for number, own in sorted(images.items())}
        self._tokens, self._ends = tokens, np.cumsum(lengths)
        content = hashlib.sha256(lengths.astype("<i8").tobytes() + tokens.astype("<i4").tobytes()).hexdigest()
        # "rows" is part of the hash that names folders of cached responses, so it stays.
        with_images = [self._image_hashes] if images else []
        self.identity = {"examples": hash_values("rows", content, sequence_length, *with_images), "prompt_tokens": None}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def has_images(self) -> bool:
        """Whether any prompt has an image."""
        return bool(self._images)

    @override
    def read(self, number: int) -> np.ndarray:
        end = int(self._ends[number])
        return self._tokens[end - int(self.lengths[number]) : end].astype(np.int64)

    @override
    def read_images(self, number: int) -> tuple[PromptImage, ...]:
        return self._images.get(number, ())

    def select(self, chosen: np.ndarray, name: str) -> "RecordPrompts":
        """Return the prompts where `chosen` [n] bool is true. name: not needed, as their content tells them apart."""
        del name
        tokens = self._tokens[np.repeat(chosen, self.lengths)]
        places = np.cumsum(chosen) - 1
        images = {int(places[number]): own for number, own in self._images.items() if chosen[number]}
        return RecordPrompts(tokens, self.lengths[chosen], self.sequence_length, images)

    def hash_documents(self) -> np.ndarray:
        """Return [n] uint64: for each prompt a hash of its tokens and images."""
        return np.array([self._hash(number) for number in range(len(self))], dtype=np.uint64)

    def _hash(self, number: int) -> int:
        tokens, images = self.read(number), self._image_hashes.get(number)
        if images is None:
            return hash_tokens(tokens)
        return hash_tokens(np.frombuffer(bytes.fromhex(hash_values(tokens.tolist(), images)), dtype="<i8"))


def find_prompt_files(path: Path | str) -> list[Path]:
    """Return the .jsonl files of `path` (a file, a folder or a glob), or none if it holds anything else.

    Raises: UserError if there is nothing.
    """
    given = Path(path).expanduser()
    if is_tokenised(given) or is_saved_dataset(given):
        return []
    files = list_input_files(str(path))
    return [file.path for file in files] if all(file.suffix == PROMPT_SUFFIX for file in files) else []


def open_record_prompts(
    files: Sequence[Path],
    *,
    checkpoint: Path,
    sequence_length: int,
    prompt_tokens: int,
    chat_template: str | None = None,
) -> RecordPrompts:
    """Read one prompt from every record and leave out those that have no room for a token of a response.

    The forms of a record are those of model/commands/prompt_records.py. prompt_tokens: of a text, that make its prompt.
    chat_template: as DrafterConfig.chat_template; only its generation prompt is needed, so it need not mark responses.

    Raises: UserError naming the record that is no prompt, or if no prompt remains.
    """
    tokenizer = load_export_tokenizer(checkpoint)
    read_image = load_image_reader(checkpoint, tokenizer)
    check_vocabulary(checkpoint, tokenizer, read_checkpoint_value(checkpoint, "vocab_size"))
    if chat_template is not None:
        with name_own_keys():
            tokenizer.chat_template = load_chat_template(checkpoint, chat_template)
    mask_token_id = read_checkpoint_value(checkpoint, "mask_token_id")
    tokens, lengths, images, num_records = array("i"), array("q"), dict[int, tuple[PromptImage, ...]](), 0
    for file in files:
        for place, record in read_prompt_records(file):
            prompt = encode_prompt_record(
                record, place, tokenizer, prompt_tokens=prompt_tokens, folder=file.parent, read_image=read_image
            )
            refuse_mask_token(prompt.token_ids, place, mask_token_id)
            num_records += 1
            if len(prompt.token_ids) < sequence_length:
                if prompt.images:
                    images[len(lengths)] = prompt.images
                tokens.extend(prompt.token_ids)
                lengths.append(len(prompt.token_ids))
    _report_usable(files, len(lengths), num_records, sequence_length)
    return RecordPrompts(np.array(tokens, np.int32), np.array(lengths, np.int64), sequence_length, images)


def _report_usable(files: Sequence[Path], num_usable: int, num_records: int, sequence_length: int) -> None:
    """Log how many prompts there are. Raises: UserError if there is none."""
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} other files"
    limit = f"train.sequence_length={sequence_length}"
    if not num_records:
        raise UserError(f"there are no prompts in {where}: give one JSON object per line")
    if not num_usable:
        raise UserError(
            f"{where}: no prompt leaves room for a response, because none is shorter than {limit} tokens: raise it or "
            "give shorter prompts"
        )
    logger.info("%s: %d prompts", where, num_usable)
    if num_usable < num_records:
        left_out = num_records - num_usable
        logger.warning(
            "%d of %d prompts leave no room for a response within %s: left out", left_out, num_records, limit
        )


def _measure_text_prompt(example: Example, prompt_tokens: int) -> int:
    """Return the tokens of a text's prompt; 0 if nothing would follow it."""
    return prompt_tokens if len(example.tokens) > prompt_tokens else 0


def _measure_chat_prompt(example: Example) -> int:
    """Return the tokens of a chat before its last response."""
    begins_response = example.drafted & ~np.append(False, example.drafted[:-1])
    return int(np.flatnonzero(begins_response)[-1])

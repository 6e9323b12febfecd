"""The data that a user gives: tokens that `data_pipeline.prepare` wrote, or records that are tokenised once."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from conf.tokenizer_info import token_text
from data_pipeline.prepare.identity import PLAN_NAME, BegunOtherwise
from data_pipeline.prepare.inputs import is_saved_dataset, list_input_files
from data_pipeline.prepare.plan import plan_source
from data_pipeline.prepare.run import DEFAULT_COLUMNS, prepare_source
from data_pipeline.storage.manifest import MANIFEST_NAME
from model.commands.prompt_records import lacks_response, read_prompt_records
from model.export.shipped_code import CONFIG_NAME, VLM_TYPE

# Keys of another command, which messages of prepare name.
FOREIGN_KEYS = ("data.prepare.", "input.")
# What prepare reports of chats that end before the assistant speaks.
LACKS_RESPONSE = (": no response", ": no answer", ": chat ends with")  # "no answer" stands in older lists
NUM_FIRST_RECORDS = 16  # enough to tell a file of prompts from one with some chats that lack their response
RESPOND_TO_THEM = "set responses.source=greedy (or sampled), and the model itself responds to them"


def is_tokenised(path: Path) -> bool:
    """Return whether `path` is a folder that prepare wrote or is writing.

    A manifest.json proves nothing: a folder of records may have one of its own.
    """
    return path.is_dir() and ((path / PLAN_NAME).is_file() or any(path.glob("*.idx")))


def find_tokens(path: Path | str, folder: Path) -> Path:
    """Return the folder with the tokens of `path`: itself, or `folder` if it holds records (see prepare_examples)."""
    given = Path(path).expanduser()
    return given if is_tokenised(given) else folder


def prepare_examples(path: Path | str, *, checkpoint: Path, folder: Path, chat_template: str | None = None) -> Path:
    """Tokenise the records of `path` into `folder` unless that is done; do nothing if `path` holds tokens.

    One process calls this while the others wait. Records are chats (column `messages`) or texts (column `text`). After
    an interruption the next call continues; if the records have changed since, it begins anew.
    chat_template: as DrafterConfig.chat_template.

    Returns: the folder of the tokens.
    Raises: UserError if records, checkpoint or `folder` cannot be used, if the records are prompts without responses,
        and if `folder` holds the tokens of other records.
    """
    records = Path(path).expanduser()
    if is_tokenised(records):
        return records
    _refuse_prompts(records)
    kind = _find_kind(records, reads_images=read_checkpoint_value(checkpoint, "model_type") == VLM_TYPE)
    source = SourceConfig(path=str(folder), input=InputConfig(kind=kind, files=str(records)))
    mask_token = token_text(checkpoint, read_checkpoint_value(checkpoint, "mask_token_id"))
    data = DataConfig(
        tokenizer=str(checkpoint), mask_token=mask_token, prepare=PrepareConfig(chat_template=chat_template)
    )
    try:
        with name_own_keys():
            _prepare(records.name, source, data)
    except UserError as error:
        raise _explain(error, kind) from error
    return folder


def _prepare(name: str, source: SourceConfig, data: DataConfig) -> None:
    """Call prepare_source; an unfinished folder of records that were fixed since is deleted and prepared anew."""
    folder = Path(source.path)
    try:
        prepare_source(name, source, data)
    except BegunOtherwise as error:
        if (folder / MANIFEST_NAME).is_file():
            raise UserError(
                f"{folder} was begun with other records or another chat template: choose another run.name, or give the "
                "former data"
            ) from error
        shutil.rmtree(folder)
        prepare_source(name, source, data)


def read_checkpoint_value(checkpoint: Path, key: str) -> Any:
    """Return an entry of the checkpoint's config.json. Raises: UserError if it has none."""
    path = checkpoint / CONFIG_NAME
    content = read_json_object(path, f"{checkpoint} is no checkpoint in the exported format: it has no {CONFIG_NAME}")
    if key not in content:
        raise UserError(f"{path} has no {key!r}: {checkpoint} is no tri-mode checkpoint")
    return content[key]


@contextmanager
def name_own_keys() -> Iterator[None]:
    """Replace keys of prepare in a UserError by those of DrafterConfig."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("data.prepare.chat_template", "chat_template")) from error


def _refuse_prompts(records: Path) -> None:
    """Raise UserError if most of the first records of a .jsonl file are prompts without responses."""
    files = [] if is_saved_dataset(records) else list_input_files(str(records))
    for file in files:
        first = _read_first(file.path) if file.suffix == ".jsonl" else []
        if 2 * sum(map(lacks_response, first)) > len(first):
            raise UserError(f"{file.path} holds prompts without responses: {RESPOND_TO_THEM}, or give responses")


def _read_first(path: Path) -> list[dict[str, Any]]:
    try:
        return [record for _, record in islice(read_prompt_records(path), NUM_FIRST_RECORDS)]
    except UserError:  # prepare counts and reports broken lines
        return []


def _find_kind(records: Path, *, reads_images: bool) -> DocumentKind:
    """Return chats if the records have messages, else texts. Raises: UserError if they have neither.

    reads_images: whether chats may have images.
    """
    for kind in (DocumentKind.image_chat if reads_images else DocumentKind.chat, DocumentKind.text):
        try:
            plan_source(InputConfig(files=str(records)), DEFAULT_COLUMNS[kind.value], int(PrepareConfig().shard_bytes))
            return kind
        except UserError as error:
            reason = str(error)
    raise UserError(
        f"{records} has neither a column 'messages' (chats) nor a column 'text' "
        f"({reason.partition(': set input')[0]}): name the column so, or prepare the data with input.column set "
        "(python -m data_pipeline.prepare) and give its folder. Prompts that the model is to respond to are .jsonl "
        "files."
    )


def _explain(error: UserError, kind: DocumentKind) -> UserError:
    """Return the error with the way to settings of prepare, and to responses, where its message needs them."""
    text = str(error)
    if any(reason in text for reason in LACKS_RESPONSE):
        text += f"\nFor chats that lack their last response, {RESPOND_TO_THEM}."
    if any(key in text for key in FOREIGN_KEYS):
        option = {"chat": "chats", "image_chat": "images", "text": "text"}[kind.value]
        text += (
            f"\nThose are settings of `python -m data_pipeline.prepare data={option}`: prepare the data with it and "
            "give its folder instead of the records."
        )
    return UserError(text)

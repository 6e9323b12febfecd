"""What a user gives as data: tokens that prepare wrote, or rows that are tokenised once."""

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

CONFIG_NAME = "config.json"
# Keys of another command, which messages of prepare name.
FOREIGN_KEYS = ("data.prepare.", "input.")
# What prepare says of chats that end before the assistant speaks.
LACKS_ANSWER = (": no answer", ": chat ends with")
NUM_FIRST_ROWS = 16  # enough to tell a file of prompts from one with some chats that lack their answer
ANSWER_THEM = "set answers.source=greedy (or sampled), and the model itself answers them"


def is_tokenised(path: Path) -> bool:
    """Whether `path` is a folder that prepare wrote or is writing (rows may have a manifest.json of their own)."""
    return path.is_dir() and ((path / PLAN_NAME).is_file() or any(path.glob("*.idx")))


def find_tokens(path: Path | str, folder: Path) -> Path:
    """Where the tokens of `path` lie: there, or in `folder` if it holds rows (see prepare_examples)."""
    given = Path(path).expanduser()
    return given if is_tokenised(given) else folder


def prepare_examples(path: Path | str, *, checkpoint: Path, folder: Path, chat_template: str | None = None) -> Path:
    """Tokenise the rows of `path` into `folder` unless that is done; nothing to do where `path` holds tokens.

    One process calls this while the others wait. Rows are chats (column `messages`) or texts (column `text`).
    chat_template: as DrafterConfig.chat_template. Interrupted, the next call continues; if the rows have changed since,
    it begins anew.

    Returns: the folder of the tokens. Raises: UserError if rows, checkpoint or `folder` cannot be used, if the rows are
    prompts without answers, and if `folder` was made of other rows.
    """
    rows = Path(path).expanduser()
    if is_tokenised(rows):
        return rows
    _refuse_prompts(rows)
    kind = _find_kind(rows)
    source = SourceConfig(path=str(folder), input=InputConfig(kind=kind, files=str(rows)))
    mask_token = token_text(checkpoint, read_checkpoint_value(checkpoint, "mask_token_id"))
    data = DataConfig(
        tokenizer=str(checkpoint), mask_token=mask_token, prepare=PrepareConfig(chat_template=chat_template)
    )
    try:
        with name_own_keys():
            _prepare(rows.name, source, data)
    except UserError as error:
        raise _explain(error, kind) from error
    return folder


def _prepare(name: str, source: SourceConfig, data: DataConfig) -> None:
    """As prepare_source; an unfinished folder of other rows, which have been mended since, is made anew."""
    folder = Path(source.path)
    try:
        prepare_source(name, source, data)
    except BegunOtherwise as error:
        if (folder / MANIFEST_NAME).is_file():
            raise UserError(
                f"{folder} was begun with other rows or another chat template: choose another run.name, or give the "
                "former data"
            ) from error
        shutil.rmtree(folder)
        prepare_source(name, source, data)


def read_checkpoint_value(checkpoint: Path, key: str) -> Any:
    """An entry of the checkpoint's config.json. Raises: UserError if it has none."""
    path = checkpoint / CONFIG_NAME
    content = read_json_object(path, f"{checkpoint} is no checkpoint in the exported format: it has no {CONFIG_NAME}")
    if key not in content:
        raise UserError(f"{path} has no {key!r}: {checkpoint} is no tri-mode checkpoint")
    return content[key]


@contextmanager
def name_own_keys() -> Iterator[None]:
    """Errors of prepare name the key that DrafterConfig has, too."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("data.prepare.chat_template", "chat_template")) from error


def _refuse_prompts(rows: Path) -> None:
    """Raises: UserError if most of the first rows of a .jsonl file are prompts without answers."""
    files = [] if is_saved_dataset(rows) else list_input_files(str(rows))
    for file in files:
        first = _read_first(file.path) if file.suffix == ".jsonl" else []
        if 2 * sum(map(lacks_response, first)) > len(first):
            raise UserError(f"{file.path} holds prompts without answers: {ANSWER_THEM}, or give answers")


def _read_first(path: Path) -> list[dict[str, Any]]:
    try:
        return [row for _, row in islice(read_prompt_records(path), NUM_FIRST_ROWS)]
    except UserError:  # prepare counts broken lines, and says so
        return []


def _find_kind(rows: Path) -> DocumentKind:
    """Chats if the rows have messages, else texts. Raises: UserError if they have neither."""
    for kind in (DocumentKind.chat, DocumentKind.text):
        try:
            plan_source(InputConfig(files=str(rows)), DEFAULT_COLUMNS[kind.value], int(PrepareConfig().shard_bytes))
            return kind
        except UserError as error:
            reason = str(error)
    raise UserError(
        f"{rows} has neither a column 'messages' (chats) nor a column 'text' ({reason.partition(': set input')[0]}): "
        "name the column so, or prepare the data with input.column set (python -m data_pipeline.prepare) and give its "
        "folder. Prompts that the model is to answer are .jsonl files."
    )


def _explain(error: UserError, kind: DocumentKind) -> UserError:
    """The same error; where it names settings of prepare, with the way to them, and with that to answers."""
    text = str(error)
    if any(reason in text for reason in LACKS_ANSWER):
        text += f"\nFor chats that lack their last answer, {ANSWER_THEM}."
    if any(key in text for key in FOREIGN_KEYS):
        option = "chats" if kind is DocumentKind.chat else "text"
        text += (
            f"\nThose are settings of `python -m data_pipeline.prepare data={option}`: prepare the data with it and "
            "give its folder instead of the rows."
        )
    return UserError(text)

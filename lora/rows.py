"""What a user gives as data: tokens that prepare wrote, or rows that are tokenised once."""

from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.json_file import read_json_object
from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from conf.tokenizer_info import token_text
from data_pipeline.prepare.identity import PLAN_NAME
from data_pipeline.prepare.inputs import is_saved_dataset, list_input_files
from data_pipeline.prepare.plan import build_plan
from data_pipeline.prepare.run import DEFAULT_COLUMNS, prepare_source

CONFIG_NAME = "config.json"
# Keys of another command, which messages of prepare name.
FOREIGN_KEYS = ("data.prepare.", "input.")


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
    chat_template: as DrafterConfig.chat_template. Interrupted, the next call continues.

    Returns: the folder of the tokens. Raises: UserError if rows, checkpoint or `folder` cannot be used, and if `folder`
    was begun with other rows.
    """
    rows = Path(path).expanduser()
    if is_tokenised(rows):
        return rows
    kind = _find_kind(rows)
    source = SourceConfig(path=str(folder), input=InputConfig(kind=kind, files=str(rows)))
    mask_token = token_text(checkpoint, read_checkpoint_value(checkpoint, "mask_token_id"))
    try:
        settings = PrepareConfig(chat_template=chat_template)
        prepare_source(
            rows.name, source, DataConfig(tokenizer=str(checkpoint), mask_token=mask_token, prepare=settings)
        )
    except UserError as error:
        raise _explain(error, kind) from error
    return folder


def read_checkpoint_value(checkpoint: Path, key: str) -> Any:
    """An entry of the checkpoint's config.json. Raises: UserError if it has none."""
    path = checkpoint / CONFIG_NAME
    content = read_json_object(path, f"{checkpoint} is no checkpoint in the exported format: it has no {CONFIG_NAME}")
    if key not in content:
        raise UserError(f"{path} has no {key!r}: {checkpoint} is no tri-mode checkpoint")
    return content[key]


def _find_kind(rows: Path) -> DocumentKind:
    """Chats if the rows have messages, else texts. Raises: UserError if there are no rows or they have neither."""
    if not is_saved_dataset(rows):
        list_input_files(str(rows))  # for its errors
    for kind in (DocumentKind.chat, DocumentKind.text):
        try:
            build_plan(InputConfig(files=str(rows)), DEFAULT_COLUMNS[kind.value], int(PrepareConfig().shard_bytes))
            return kind
        except UserError as error:
            reason = str(error)
    raise UserError(
        f"{rows} has neither a column 'messages' (chats) nor a column 'text' ({reason.partition(': set input')[0]}): "
        "name the column so, or prepare the data with input.column set (python -m data_pipeline.prepare) and give its "
        "folder"
    )


def _explain(error: UserError, kind: DocumentKind) -> UserError:
    """The same error; where it names settings of prepare, with the way to them."""
    if not any(key in str(error) for key in FOREIGN_KEYS):
        return error
    option = "chats" if kind is DocumentKind.chat else "text"
    return UserError(
        f"{error}\nThose are settings of `python -m data_pipeline.prepare data={option}`: prepare the data with it and "
        "give its folder instead of the rows."
    )

"""JSON files of users: an object is read, or one message says what is wrong with the file."""

import json
from pathlib import Path
from typing import Any

from conf.system.errors import UserError


def read_json_object(path: Path, if_missing: str) -> dict[str, Any]:
    """Read the object in `path`. if_missing: message of the error when there is no such file.

    Raises: UserError if the file is missing, is not JSON, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(if_missing) from None
    except RecursionError:
        raise UserError(f"{path} is damaged: nested too deep") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read the object in `path`; empty if there is no such file. Raises: UserError if the file is damaged."""
    return read_json_object(path, f"{path} has disappeared") if path.is_file() else {}

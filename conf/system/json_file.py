"""Reading a JSON object from a file of the user's, with one clear message for each way it can be wrong."""

import json
from pathlib import Path
from typing import Any

from conf.system.errors import UserError


def read_json_object(path: Path, if_missing: str) -> dict[str, Any]:
    """The object in `path`. if_missing: message of the error when there is no such file.

    Raises: UserError if the file is missing, is no JSON, or holds something else than an object.
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

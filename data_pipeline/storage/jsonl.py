"""Rows to a .jsonl file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from conf.system.atomic import atomic_write_bytes


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path | str) -> None:
    """One JSON object per line, in UTF-8; the file appears complete or not at all. For rows that fit in memory."""
    atomic_write_bytes(Path(path), b"".join(orjson.dumps(row) + b"\n" for row in rows))

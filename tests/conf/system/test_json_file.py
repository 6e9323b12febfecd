"""However a JSON file is wrong, reading it ends in one message."""

from pathlib import Path

import pytest

from conf.system.errors import UserError
from conf.system.json_file import read_json_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 200_000, "nested too deep"),
        (b'{"a":' * 200_000, "nested too deep"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        read_json_object(path, "missing")


def test_a_missing_file_gets_the_callers_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^put it there$"):
        read_json_object(tmp_path / "none.json", "put it there")

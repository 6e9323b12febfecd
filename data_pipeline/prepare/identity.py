"""Lock a dataset's folder and record in plan.json what it is made of, so that nothing is mixed or done twice."""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from conf.system.atomic import atomic_write_text
from conf.system.errors import UserError
from conf.system.json_file import read_json_object
from conf.system.lock import try_lock
from data_pipeline.storage.manifest import manifest_path

PLAN_NAME = "plan.json"
LOCK_NAME = ".lock"


class BegunOtherwise(UserError):
    """Says that a folder is being made, or was made, of other inputs or with other settings."""


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Lock `directory` (made if it is not there) for this process; the system releases it however the process ends.

    A finished dataset that cannot be written to is not locked, as nothing will be written.
    Raises UserError if another live process has locked it, or it cannot be written.
    """
    with _open_lock(directory) as file:
        if file and not try_lock(file):
            raise UserError(f"{directory} is being written by another run of prepare: wait for it or stop it")
        yield


def _open_lock(directory: Path) -> AbstractContextManager[IO | None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return open(directory / LOCK_NAME, "a", encoding="utf-8")
    except OSError as error:
        if manifest_path(directory).is_file():
            return nullcontext()
        raise UserError(f"{directory} cannot be written: {error.strerror}") from error


def begin(directory: Path, identity: dict[str, Any]) -> None:
    """Declare that `directory` is made of `identity`, or check that it was begun with the same.

    Raises BegunOtherwise if it was begun with something else (naming what differs), UserError if it holds files
    that prepare did not make.
    """
    path = directory / PLAN_NAME
    if path.exists():
        former = read_json_object(path, f"{path} has disappeared")
        if differences := _differences(former, identity):
            raise BegunOtherwise(
                f"{directory} was begun with other inputs or settings: {'; '.join(differences)}. Give what it was "
                "begun with, choose another path, or delete the folder"
            )
        return
    strangers = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    if strangers:
        raise UserError(
            f"{directory} holds files that prepare did not make ({', '.join(strangers[:3])}): choose another path"
        )
    atomic_write_text(path, json.dumps(identity, indent=2) + "\n")


def _differences(former: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one phrase per key that differs."""
    keys = [key for key in dict.fromkeys([*former, *now]) if key != "inputs"]
    settings = [
        f"{key} was {former.get(key)!r}, now {now.get(key)!r}" for key in keys if former.get(key) != now.get(key)
    ]
    return settings + _input_differences(former.get("inputs", []), now["inputs"])


def _input_differences(former: list[dict], now: list[dict]) -> list[str]:
    before = {item["name"]: item for item in former}
    after = {item["name"]: item for item in now}
    kinds = {
        "changed since": [name for name in before.keys() & after.keys() if before[name] != after[name]],
        "missing now": list(before.keys() - after.keys()),
        "new": list(after.keys() - before.keys()),
    }
    phrases = [f"{what}: {', '.join(sorted(names)[:3])}" for what, names in kinds.items() if names]
    return phrases or (["the order of the inputs"] if former != now else [])

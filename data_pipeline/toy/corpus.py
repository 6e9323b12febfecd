"""Build toy corpora from what is on every machine: texts and chats of the standard library of the running Python."""

import ast
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from conf.system.atomic import atomic_write_bytes
from conf.system.errors import UserError

# Not prose-like source: generated tables, test suites, and packages that distributions add or drop at will.
EXCLUDED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# Written when Python was built on this machine, so different everywhere.
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")
HELDOUT_EVERY = 10

SHORTEST_RESPONSE, LONGEST_RESPONSE = 20, 800  # characters
LONGEST_CALL = 160  # characters; above it the arguments are left out of the question
SYSTEM = "You answer questions about the standard library of Python."
QUESTIONS = (
    "What does `{call}` do?",
    "Explain `{call}`.",
    "What is `{name}` for?",
    "Describe `{name}` from the module `{module}`.",
    "I found `{call}` in a program. What is it?",
    "In one paragraph: `{name}`",
)
FOLLOW_UPS = ("Which arguments does it take?", "How is it called?", "What are its parameters?")

type Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class TextSplit:
    """Holds documents (one source file each) to train on, and documents to evaluate with."""

    train: list[str]
    heldout: list[str]


def default_root() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def list_source_files(root: Path) -> list[Path]:
    """List Python files under `root`, without excluded folders, in the order of their relative POSIX paths."""
    relative = [path.relative_to(root) for path in root.rglob("*.py")]
    return [root / path for path in sorted(filter(_is_wanted, relative), key=Path.as_posix)]


def _is_wanted(relative_path: Path) -> bool:
    return not any(part in EXCLUDED_FOLDERS or part.startswith(EXCLUDED_PREFIXES) for part in relative_path.parts)


def load_standard_library(root: Path | None = None) -> TextSplit:
    """Load the sources under `root` (default: this Python's library); every tenth file, with the first, is held out.

    Empty files are left out before the split. Raises UserError where there are too few sources for a split.
    """
    root = root or default_root()
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in list_source_files(root)]
    texts = [text for text in texts if text.strip()]
    if len(texts) < HELDOUT_EVERY:
        raise UserError(
            f"{root} holds {len(texts)} usable Python sources, at least {HELDOUT_EVERY} are needed: "
            "use a Python that ships the sources of its standard library."
        )
    return TextSplit(
        train=[text for i, text in enumerate(texts) if i % HELDOUT_EVERY],
        heldout=texts[::HELDOUT_EVERY],
    )


@dataclass(frozen=True)
class ChatSplit:
    """Holds chats, each {"messages": [...]}, to train on and to evaluate with. They come from different files."""

    train: list[dict[str, Any]]
    heldout: list[dict[str, Any]]


@dataclass(frozen=True)
class _Entry:
    """A documented public name. arguments: as in its definition, without annotations; None for a class."""

    module: str
    name: str
    arguments: str | None
    summary: str

    @property
    def call(self) -> str:
        """Return how a question names it."""
        return f"{self.name}({self.arguments})" if self.arguments and len(self.arguments) < LONGEST_CALL else self.name


def load_docstring_chats(root: Path | None = None) -> ChatSplit:
    """Write chats about the sources under `root` (default: this Python's library), in the order of their definitions.

    Files that load_standard_library holds out are held out here as well. The wording, whether there is a system
    message and whether a second question follows depend on the documented name alone.
    Raises UserError where there is nothing documented to hold out or to train on.
    """
    root = root or default_root()
    texts = [(path, path.read_text(encoding="utf-8", errors="replace")) for path in list_source_files(root)]
    split = ChatSplit([], [])
    for number, (path, text) in enumerate((path, text) for path, text in texts if text.strip()):
        chats = split.train if number % HELDOUT_EVERY else split.heldout
        chats += [{"messages": _write_chat(entry)} for entry in _find_entries(text, _module_name(path, root))]
    if not split.train or not split.heldout:
        raise UserError(f"{root} holds too few documented Python sources: use a Python that ships its library's.")
    return split


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _find_entries(text: str, module: str) -> list[_Entry]:
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a source that demonstrates an error
        return []
    return list(_visit(tree, module, module))


def _visit(scope: ast.Module | ast.ClassDef, module: str, prefix: str) -> Iterator[_Entry]:
    """Yield the documented public definitions of a module or class and of the classes within."""
    for node in scope.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        summary = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if SHORTEST_RESPONSE <= len(summary) <= LONGEST_RESPONSE:
            yield _Entry(module, name, None if isinstance(node, ast.ClassDef) else _list_arguments(node), summary)
        if isinstance(node, ast.ClassDef):
            yield from _visit(node, module, name)


def _list_arguments(function: Function) -> str:
    """List arguments as a caller gives them: without annotations, without the object a method is called on."""
    for positional in (function.args.posonlyargs, function.args.args):
        if positional and positional[0].arg in ("self", "cls"):
            del positional[0]
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(function.args)


def _write_chat(entry: _Entry) -> list[dict[str, str]]:
    choice = zlib.crc32(entry.name.encode())
    choice, question = divmod(choice, len(QUESTIONS))
    choice, follow_up = divmod(choice, len(FOLLOW_UPS))
    messages = [{"role": "system", "content": SYSTEM}] if choice % 4 == 0 else []
    asked = QUESTIONS[question].format(call=entry.call, name=entry.name, module=entry.module)
    messages += _turn(asked, entry.summary)
    if entry.arguments is not None and choice // 4 % 3 == 0:
        messages += _turn(FOLLOW_UPS[follow_up], _describe_arguments(entry))
    return messages


def _describe_arguments(entry: _Entry) -> str:
    return f"Call it as `{entry.name}({entry.arguments})`." if entry.arguments else f"`{entry.name}()` takes none."


def _turn(question: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}]


def write_jsonl(records: Iterable[dict[str, Any]], path: Path | str) -> None:
    """Write one JSON object per line, in UTF-8; the file appears complete or not at all. Records must fit in memory."""
    atomic_write_bytes(Path(path), b"".join(orjson.dumps(record) + b"\n" for record in records))

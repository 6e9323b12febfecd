"""No retired word of CONTRIBUTING.md's table is used, no public name is defined twice, docstrings are sentences."""

import ast
import io
import re
import subprocess
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".yaml", ".md", ".sh", ".sbatch", ".toml", ".jinja"}
HISTORY = ("CHANGELOG.md", "CONTRIBUTING.md", "tests/test_words.py")  # they must name what is retired
COLUMNS = 4


@dataclass(frozen=True)
class RetiredWord:
    """One word of the table.

    scope: text or names. instead: what to say, in which the word itself may stand (`attended_pairs`). allowed: paths
    (or folders) that may use the word.
    """

    word: str
    scope: str
    instead: tuple[str, ...]
    allowed: tuple[str, ...]


def read_table() -> list[RetiredWord]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\|(.*)\|$", text[text.index("| retired |") :], re.MULTILINE)[2:]
    return [word for line in lines for word in read_row(line.split("|"))]


def read_row(cells: list[str]) -> Iterator[RetiredWord]:
    retired, instead, scope, allowed = (cell.strip() for cell in cells)
    for word in in_backticks(retired) if scope else ():
        yield RetiredWord(word, scope, in_backticks(instead), in_backticks(allowed))


def in_backticks(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


WORDS = read_table()


@cache
def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [file for file in listed.splitlines() if (ROOT / file).is_file()]
    return [file for file in files if file == "Makefile" or Path(file).suffix in SUFFIXES]


@cache
def text_of(file: str) -> str:
    """Return the whole file, identifiers split into words: block_padding and BlockPadding become `block padding`."""
    return split_words((ROOT / file).read_text(encoding="utf-8"))


@cache
def names_of(file: str) -> str:
    """Return the file's path and the identifiers or keys in it, one to a line and split into words."""
    path = ROOT / file
    names = [file]
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        names += {token.string for token in tokens if token.type == tokenize.NAME}
    elif path.suffix == ".yaml":
        names += keys_of(OmegaConf.load(path))
    return "\n".join(split_words(name) for name in names)


def keys_of(node: object) -> Iterator[str]:
    for key, value in node.items_ex(resolve=False) if isinstance(node, DictConfig) else ():
        yield str(key)
        yield from keys_of(value)


def split_words(text: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", text).lower()


def uses(word: RetiredWord) -> list[str]:
    """Return `file: line` of every use outside of the paths where the word is allowed."""
    pattern = re.compile(rf"(?<![a-z]){re.escape(split_words(word.word))}(?![a-z])")
    read = text_of if word.scope == "text" else names_of
    instead = re.compile("|".join(re.escape(split_words(phrase)) for phrase in word.instead) or "(?!)")
    files = [file for file in tracked_files() if not file.startswith((*HISTORY, *word.allowed))]
    lines = [(file, line.strip()) for file in files for line in read(file).splitlines()]
    return [f"{file}: {line}" for file, line in lines if pattern.search(instead.sub("", line))]


@pytest.mark.parametrize("word", WORDS, ids=lambda word: f"{word.word} in {word.scope}")
def test_a_retired_word_is_not_used(word: RetiredWord) -> None:
    found = uses(word)
    assert not found, f"{len(found)} uses of {word.word!r}; say what CONTRIBUTING.md says instead\n" + "\n".join(found)


def test_the_table_is_read_and_its_paths_exist() -> None:
    assert {word.scope for word in WORDS} == {"text", "names"}
    assert len(WORDS) > 5
    for word in WORDS:
        for path in word.allowed:
            assert any(file.startswith(path) for file in tracked_files()), path


def test_a_word_is_found_within_identifiers_and_only_as_a_whole() -> None:
    words = split_words("num_completions of BlockCompletion: autocompletion")
    assert re.findall(r"(?<![a-z])completions?(?![a-z])", words) == ["completions", "completion"]


IN_EVERY_COMMAND = {"main", "build_parser"}


def test_a_public_name_is_defined_in_one_module() -> None:
    modules = defaultdict(set)
    for file in tracked_files():
        if file.endswith(".py") and not file.startswith("tests/"):
            for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    modules[node.name].add(file)
    twice = [f"{name}: {', '.join(sorted(files))}" for name, files in modules.items() if len(files) > 1]
    twice = [found for found in twice if found.split(":")[0] not in IN_EVERY_COMMAND]
    assert not twice, "\n".join(twice)


FRAGMENTS = {"Of", "As", "That", "Those", "Behind"}  # first words of a docstring that only the signature explains


def docstring_fragments(file: str) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = re.match(r"\w+", ast.get_docstring(node) or "")
            if first and first[0] in FRAGMENTS:
                yield f"{file}:{getattr(node, 'lineno', 1)}: {first[0]} ..."


def test_docstrings_begin_with_a_sentence() -> None:
    files = [file for file in tracked_files() if file.endswith(".py")]
    assert [found for file in files for found in docstring_fragments(file)] == []

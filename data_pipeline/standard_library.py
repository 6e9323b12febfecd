"""Real text that is on every machine: the sources of the running Python's standard library."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

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


@dataclass
class TextSplit:
    """Documents (one source file each) to train on and documents kept for evaluation."""

    train: list[str]
    heldout: list[str]


def default_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def list_source_files(root: Path) -> list[Path]:
    """Python files under `root` without the excluded folders, in the order of their relative POSIX paths."""
    relative = [path.relative_to(root) for path in root.rglob("*.py")]
    return [root / path for path in sorted(filter(_is_wanted, relative), key=Path.as_posix)]


def _is_wanted(relative_path: Path) -> bool:
    return not any(part in EXCLUDED_FOLDERS or part.startswith(EXCLUDED_PREFIXES) for part in relative_path.parts)


def load_standard_library(root: Path | None = None) -> TextSplit:
    """Sources under `root` (default: this Python's library); every tenth file, the first included, is held out.

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

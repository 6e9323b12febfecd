"""Where the quickstart puts things."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from model.export.draft_adapter import ADAPTER_FOLDER


@dataclass(frozen=True)
class QuickstartFolder:
    """`<root>/quickstart/`; the same names as conf/data/quickstart.yaml, conf/experiment/quickstart_*.yaml and
    conf/drafter/experiment/quickstart.yaml use.

    root: parent of run folders (`run.root`).
    """

    root: Path

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.root / "quickstart"

    @property
    def request(self) -> Path:
        """What the user asked for when the folder was begun, as JSON."""
        return self.path / "request.json"

    @property
    def tokenizer(self) -> Path:
        """Hugging Face tokenizer directory."""
        return self.path / "tokenizer"

    @property
    def text(self) -> Path:
        """Documents as .jsonl."""
        return self.path / "data" / "text"

    @property
    def train_data(self) -> Path:
        """Training tokens."""
        return self.path / "data" / "train"

    @property
    def heldout_data(self) -> Path:
        """Held-out tokens."""
        return self.path / "data" / "heldout"

    @property
    def unigram(self) -> Path:
        """Unigram entropy of the held-out text, as JSON."""
        return self.path / "data" / "unigram.json"

    @property
    def start(self) -> Path:
        """Toy start checkpoint in the released Ministral 3 format."""
        return self.path / "start"

    def run(self, stage: str) -> Path:
        """Run folder of a training stage."""
        return self.path / stage

    @property
    def export(self) -> Path:
        """Exported tri-mode Hugging Face checkpoint."""
        return self.path / "export"

    @property
    def adapter(self) -> Path:
        """Its draft adapter."""
        return self.export / ADAPTER_FOLDER

    @property
    def decoding(self) -> Path:
        """What the decoding process measured, as JSON."""
        return self.path / "decoding.json"

    @property
    def instruct(self) -> Path:
        """Exported instruct checkpoint."""
        return self.path / "instruct"

    @property
    def answers(self) -> Path:
        """What it answered, as JSON."""
        return self.path / "answers.json"

    @property
    def phases(self) -> Path:
        """Finished phases and their seconds, as JSON."""
        return self.path / "phases.json"

    @property
    def curves(self) -> Path:
        """Picture of the loss curves."""
        return self.path / "loss_curves.png"

    @property
    def summary(self) -> Path:
        """Everything the quickstart found, as JSON."""
        return self.path / "summary.json"


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object that an earlier phase wrote. Raises UserError if it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): run the quickstart again with --fresh.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: run the quickstart again with --fresh.")
    return value


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Name the files and folders of a quickstart."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.system.errors import UserError
from model.export.draft_adapter import ADAPTER_FOLDER


@dataclass(frozen=True)
class QuickstartFolder:
    """Names what lies in `<root>/quickstart/`.

    conf/data/quickstart.yaml, conf/experiment/quickstart_*.yaml and conf/drafter/experiment/quickstart.yaml use the
    same names. root: parent of run folders (`run.root`).
    """

    root: Path

    @property
    def path(self) -> Path:
        """Folder of everything the quickstart writes."""
        return self.root / "quickstart"

    @property
    def request(self) -> Path:
        """Overrides with which the folder was begun, as JSON."""
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
        """Draft adapter of the export."""
        return self.export / ADAPTER_FOLDER

    @property
    def decoding(self) -> Path:
        """Measurements of the decoding process, as JSON."""
        return self.path / "decoding.json"

    @property
    def instruct(self) -> Path:
        """Exported instruct checkpoint."""
        return self.path / "instruct"

    @property
    def responses(self) -> Path:
        """Responses of the instruct checkpoint, as JSON."""
        return self.path / "responses.json"

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
        """Results of all phases and their checks, as JSON."""
        return self.path / "summary.json"


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that an earlier phase wrote.

    Raises:
        UserError: The file is missing or broken.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): run the quickstart again with --fresh.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: run the quickstart again with --fresh.")
    return value


def remove(path: Path) -> None:
    """Delete a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

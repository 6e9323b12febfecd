"""Which checkpoint this is, without reading all of it."""

import hashlib
from pathlib import Path

CONFIG_NAME = "config.json"
NUM_SAMPLES, SAMPLE_BYTES = 64, 4096


def identify_checkpoint(directory: Path) -> str:
    """Hash of an export: its configuration, names and sizes of its weight files, and samples of their bytes.

    Training changes nearly every weight, so that samples tell checkpoints apart; the first of each file is its header.
    """
    digest = hashlib.sha256((directory / CONFIG_NAME).read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(NUM_SAMPLES):
                file.seek(size * index // NUM_SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()

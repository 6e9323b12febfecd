"""Record the losses of short runs of every stage as two-column text files: step and loss.

    python -m tests.golden.record     # overwrite tests/golden/*.txt with what this code computes

The text is made from a fixed generator instead of this machine's files, so that every machine trains on the same
tokens. The files were first written by the code of November 2026 (commit db8fe4c), before it was restructured.
"""

import random
import tempfile
from pathlib import Path

from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer
from tests.helpers.processes import load_lines, train_many
from tests.helpers.toy_data import (
    CHAT_SEQUENCE_LENGTH,
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    ToyData,
    prepare_chats,
    prepare_texts,
    tokens_of,
)

FOLDER = Path(__file__).parent
STAGES = ("ar", "joint", "sft")
NUM_STEPS = 6
SYLLABLES = ("ka", "lo", "mi", "ne", "ru", "si", "to", "va", "pel", "dor", "an", "esh")


def record_losses(directory: Path) -> dict[str, list[float]]:
    """Train each stage for a few steps in `directory`, on one process; return the losses by stage."""
    data = make_fixed_data(directory / "data")
    jobs = [_overrides(stage, data, directory) for stage in STAGES]
    train_many(1, jobs, directory)
    return {stage: [line["loss"] for line in load_lines(directory / stage, "train")] for stage in STAGES}


def make_fixed_data(directory: Path) -> ToyData:
    """Write tokenizer and datasets of text that is the same on every machine."""
    generator = random.Random(11)
    texts = [_write_text(generator, generator.randint(5, 60)) for _ in range(400)]
    chats = [_write_chat(generator) for _ in range(200)]
    tokenizer = directory / "tokenizer"
    save_tokenizer(train_tokenizer(texts, VOCAB_SIZE), tokenizer)
    prepare_texts(texts, tokenizer, directory / "train")
    prepare_chats(chats, tokenizer, directory / "train_chats")
    return ToyData(
        train=directory / "train",
        heldout=directory / "train",
        train_chats=directory / "train_chats",
        heldout_chats=directory / "train_chats",
        tokenizer=tokenizer,
    )


def load_golden(stage: str) -> list[float]:
    """Load the losses of a stage's file, in step order."""
    lines = (FOLDER / f"{stage}.txt").read_text(encoding="utf-8").splitlines()
    return [float(line.split()[1]) for line in lines]


def _overrides(stage: str, data: ToyData, directory: Path) -> list[str]:
    chats = stage == "sft"
    folder = [f"run.root={directory}", f"run.name={stage}"]
    length = CHAT_SEQUENCE_LENGTH if chats else SEQUENCE_LENGTH
    return [
        *(f"stage={stage}", *data.overrides(chats=chats), tokens_of(NUM_STEPS, chats=chats), *folder),
        *(f"data.sequence_length={length}", "evaluation.every_steps=0"),
    ]


def _write_text(generator: random.Random, num_words: int) -> str:
    return " ".join("".join(generator.choices(SYLLABLES, k=generator.randint(1, 3))) for _ in range(num_words))


def _write_chat(generator: random.Random) -> dict[str, list[dict[str, str]]]:
    roles = ["user", "assistant"] * generator.randint(1, 2)
    return {"messages": [{"role": role, "content": _write_text(generator, generator.randint(2, 12))} for role in roles]}


def main() -> None:
    """Write tests/golden/<stage>.txt."""
    with tempfile.TemporaryDirectory() as directory:
        for stage, losses in record_losses(Path(directory)).items():
            lines = [f"{step} {loss:.9f}\n" for step, loss in enumerate(losses, start=1)]
            (FOLDER / f"{stage}.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

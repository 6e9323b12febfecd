"""A tokenised corpus small enough for tests, made by the project's own pipeline from real text."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import DataConfig, DocumentKind, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.prepare.run import prepare_source
from data_pipeline.toy.corpus import load_docstring_chats, load_standard_library, write_jsonl
from data_pipeline.toy.tokenizer import save_tokenizer, train_tokenizer

VOCAB_SIZE = 384
SEQUENCE_LENGTH, CHAT_SEQUENCE_LENGTH = 64, 192


@dataclass(frozen=True)
class ToyData:
    """Folders of the datasets (texts, and chats for instruct tuning) and of the tokenizer."""

    train: Path
    heldout: Path
    train_chats: Path
    heldout_chats: Path
    tokenizer: Path

    def overrides(self, chats: bool = False) -> list[str]:
        """Return what a run on these texts (or chats) is started with, next to its stage, layout and name."""
        train, heldout = (self.train_chats, self.heldout_chats) if chats else (self.train, self.heldout)
        return [
            "model=tiny",
            "precision=fp32",
            "runtime=cpu",
            "runtime.progress_bar=false",
            "runtime.tensorboard=false",
            f"data.train={train}",
            f"data.heldout={heldout}",
            f"data.tokenizer={self.tokenizer}",
            f"data.sequence_length={CHAT_SEQUENCE_LENGTH if chats else SEQUENCE_LENGTH}",
            "stage.block_size=16",
            "train.global_batch_size=8",
            "train.micro_batch_size=2",
            "evaluation.sequences=6",
            "evaluation.every_steps=5",
            "schedule.peak_lr=1e-3",
            "schedule.final_lr=1e-4",
        ]


def tokens_of(num_steps: int, chats: bool = False) -> str:
    """Return the override that makes a run of `num_steps` steps with the batch above."""
    return f"train.tokens={num_steps * 8 * (CHAT_SEQUENCE_LENGTH if chats else SEQUENCE_LENGTH)}"


def make_toy_data(directory: Path) -> ToyData:
    """Train the tokenizer and write both datasets into `directory`."""
    split = load_standard_library()
    tokenizer_dir = directory / "tokenizer"
    save_tokenizer(train_tokenizer(split.train[:40], VOCAB_SIZE), tokenizer_dir)
    prepare_texts(cut_paragraphs(split.train[:30]), tokenizer_dir, directory / "train")
    prepare_texts(cut_paragraphs(split.heldout[:5]), tokenizer_dir, directory / "heldout")
    chats = load_docstring_chats()
    prepare_chats(choose_short(chats.train, 300), tokenizer_dir, directory / "train_chats")
    prepare_chats(choose_short(chats.heldout, 30), tokenizer_dir, directory / "heldout_chats")
    return ToyData(
        train=directory / "train",
        heldout=directory / "heldout",
        train_chats=directory / "train_chats",
        heldout_chats=directory / "heldout_chats",
        tokenizer=tokenizer_dir,
    )


def choose_short(chats: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the chats with the fewest characters, so that several fit into a sequence."""
    return sorted(chats, key=lambda chat: sum(len(message["content"]) for message in chat["messages"]))[:count]


def cut_paragraphs(texts: list[str]) -> list[str]:
    """Split texts into documents about as long as a sequence or shorter, so that most sequences hold several."""
    return [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]


def prepare_texts(texts: list[str], tokenizer_dir: Path, directory: Path) -> None:
    """Tokenise documents into the dataset folder `directory`, by way of a .jsonl file beside it."""
    _prepare(({"text": text} for text in texts), DocumentKind.text, tokenizer_dir, directory)


def prepare_chats(chats: list[dict[str, Any]], tokenizer_dir: Path, directory: Path) -> None:
    """Prepare chats, rendered in the template of the model family."""
    _prepare(chats, DocumentKind.chat, tokenizer_dir, directory)


def _prepare(records: Iterable[dict[str, Any]], kind: DocumentKind, tokenizer_dir: Path, directory: Path) -> None:
    file = directory.with_suffix(".jsonl")
    write_jsonl(records, file)
    source = SourceConfig(path=str(directory), input=InputConfig(kind, files=str(file)))
    settings = PrepareConfig(workers=1, chat_template="chatml")
    prepare_source(directory.name, source, DataConfig(tokenizer=str(tokenizer_dir), prepare=settings))

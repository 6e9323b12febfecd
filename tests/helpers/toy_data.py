"""A tokenised corpus small enough for tests, made by the project's own pipeline from real text."""

from dataclasses import dataclass
from pathlib import Path

from conf.schema import DataConfig, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.jsonl import write_jsonl
from data_pipeline.prepare.run import prepare_source
from data_pipeline.standard_library import load_standard_library
from data_pipeline.tokenizer import save_tokenizer, train_tokenizer

VOCAB_SIZE = 384
SEQUENCE_LENGTH = 64


@dataclass(frozen=True)
class ToyData:
    """Folders of the datasets and the tokenizer's directory."""

    train: Path
    heldout: Path
    tokenizer: Path

    def overrides(self) -> list[str]:
        """What a run on this data is started with, next to its stage, layout and name."""
        return [
            "model=tiny",
            "precision=fp32",
            "runtime=cpu",
            "runtime.progress_bar=false",
            "runtime.tensorboard=false",
            f"data.train={self.train}",
            f"data.heldout={self.heldout}",
            f"data.tokenizer={self.tokenizer}",
            f"data.sequence_length={SEQUENCE_LENGTH}",
            "stage.block_size=16",
            "train.global_batch_size=8",
            "train.micro_batch_size=2",
            "evaluation.sequences=6",
            "evaluation.every_steps=5",
            "schedule.peak_lr=1e-3",
            "schedule.final_lr=1e-4",
        ]


def tokens_of(num_steps: int) -> str:
    """Override that makes a run of `num_steps` steps with the batch above."""
    return f"train.tokens={num_steps * 8 * SEQUENCE_LENGTH}"


def make_toy_data(directory: Path) -> ToyData:
    """Trains the tokenizer and writes both datasets into `directory`."""
    split = load_standard_library()
    tokenizer_dir = directory / "tokenizer"
    save_tokenizer(train_tokenizer(split.train[:40], VOCAB_SIZE), tokenizer_dir)
    prepare_texts(cut_paragraphs(split.train[:30]), tokenizer_dir, directory / "train")
    prepare_texts(cut_paragraphs(split.heldout[:5]), tokenizer_dir, directory / "heldout")
    return ToyData(directory / "train", directory / "heldout", tokenizer_dir)


def cut_paragraphs(texts: list[str]) -> list[str]:
    """Documents about as long as a sequence, so that most sequences hold several."""
    return [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]


def prepare_texts(texts: list[str], tokenizer_dir: Path, directory: Path) -> None:
    """Tokenises documents into the dataset folder `directory`, by way of a .jsonl file beside it."""
    rows = directory.with_suffix(".jsonl")
    write_jsonl(({"text": text} for text in texts), rows)
    source = SourceConfig(path=str(directory), input=InputConfig(files=str(rows)))
    data = DataConfig(tokenizer=str(tokenizer_dir), prepare=PrepareConfig(workers=1))
    prepare_source(directory.name, source, data)

"""Where tokens come from: sources, how prepare reads them, and how sequences are made of them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING


class DocumentKind(Enum):
    """text: one string per document, every token scored. chat: messages, the assistant's tokens scored.

    image_chat: chats whose prompts may hold images.
    """

    text = "text"
    chat = "chat"
    image_chat = "image_chat"

    @property
    def is_chat(self) -> bool:
        """Return whether the segments of a document alternate: prompt, response, prompt, response, ..."""
        return self is not DocumentKind.text


class Split(Enum):
    """Records that prepare takes of an input: all, heldout (one in `data.prepare.heldout_every`) or train (the others).

    The hash of what is trained on decides, images included.
    """

    all = "all"
    train = "train"
    heldout = "heldout"


class OverlongChat(Enum):
    """Treatment of a chat longer than a sequence.

    truncate: its beginning is used, and it is left out if that holds no response. drop: it is left out.
    """

    truncate = "truncate"
    drop = "drop"


@dataclass
class InputConfig:
    """Input that `data_pipeline.prepare` reads. Give either `files` or `dataset`.

    files: a file, a folder or a glob of .jsonl, .jsonl.gz, .jsonl.zst or .parquet (of image chats also .tar, as
        WebDataset writes them), or a folder that `datasets` wrote with save_to_disk.
    dataset, subset, split, revision: a dataset of the Hugging Face hub, read as it streams.
    column: of the text or the messages; null means `text` or `messages`. FineVision's is `texts`.
    images: column of the images of image chats, where a record's messages do not hold them; null means `images`.
    records: which records are taken.
    licence: of the data, for the record.
    """

    kind: DocumentKind = DocumentKind.text
    files: Optional[str] = None
    dataset: Optional[str] = None
    subset: Optional[str] = None
    split: str = "train"
    revision: Optional[str] = None
    column: Optional[str] = None
    images: Optional[str] = None
    records: Split = Split.all
    licence: Optional[str] = None


@dataclass
class SourceConfig:
    """One source of a blend.

    path: tokenised data: a folder that prepare writes, or the prefix of a .bin/.idx pair of another Megatron tool.
    weight: share of the sequences that come from here, relative to the other sources; or
    tokens: a budget in tokens, padding included; the budgets of a blend are its weights. A lone source needs neither.
    input: what prepare makes `path` from; null where the tokens exist already.
    """

    path: str = MISSING
    weight: Optional[float] = None
    tokens: Optional[float] = None
    input: Optional[InputConfig] = None


@dataclass
class PrepareConfig:
    """Preparation of inputs as tokens. Nothing here but heldout_every and chat_template changes which tokens there are.

    workers: processes; 0 means one per core.
    shard_bytes: of input per shard, images included; a shard is what an interrupted run may have to do again.
    heldout_every: `input.records: heldout` takes about one record in so many, by its hash; `train` takes the others.
    max_skipped_share: of a source's records, 0..1; more unusable records than this are an error.
    chat_template: of chats: null is the tokenizer's own, `chatml` the one of the model family, else a jinja file.
    """

    workers: int = 0
    shard_bytes: float = 256e6
    heldout_every: int = 1000
    max_skipped_share: float = 0.001
    chat_template: Optional[str] = None


@dataclass
class DataConfig:
    """Sources, the tokenizer that makes (or made) their tokens, and the form of a training sequence.

    folder: parent of the sources' paths, where options of the group `data` put them.
    train, heldout: a path of tokenised data, or a blend {name: SourceConfig}; heldout may be null (no evaluation).
    tokenizer: directory of a Hugging Face tokenizer.
    mask_token: text of the mask token; its id is looked up in the tokenizer, never assumed.
    sequence_length: tokens of one training sequence (the clean length; the joint stage doubles it inside).
    isolate_documents: documents of one sequence do not see each other and each starts at position 0.
    block_padding_loss: score the end-of-turn tokens that complete a document's last block (joint stages).
    overlong_chats: see OverlongChat.
    prefetch_steps: steps whose batches are read ahead, in the background; 0 reads when they are needed.
    image_workers: threads of each process that decode images; 0 decodes one after another.
    """

    folder: Optional[str] = None
    train: Any = field(default=MISSING, metadata={"values": SourceConfig})
    heldout: Any = field(default=None, metadata={"values": SourceConfig})
    tokenizer: str = MISSING
    mask_token: str = "<SPECIAL_100>"
    sequence_length: int = 4096
    isolate_documents: bool = True
    block_padding_loss: bool = True
    overlong_chats: OverlongChat = OverlongChat.truncate
    prefetch_steps: int = 1
    image_workers: int = 4
    prepare: PrepareConfig = field(default_factory=PrepareConfig)

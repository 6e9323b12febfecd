"""Where tokens come from."""

from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING


@dataclass
class DataConfig:
    """Tokenised datasets in megatron-core's indexed format and the tokenizer that made them.

    train, heldout: prefixes of `.bin`/`.idx` pairs; heldout may be null (no evaluation).
    tokenizer: directory of a Hugging Face tokenizer.
    mask_token: text of the mask token; its id is looked up in the tokenizer, never assumed.
    sequence_length: tokens of one training sequence (the clean length; the joint stage doubles it inside).
    """

    train: str = MISSING
    heldout: Optional[str] = None
    tokenizer: str = MISSING
    mask_token: str = "<SPECIAL_100>"
    sequence_length: int = 4096

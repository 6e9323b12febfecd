"""Command-line values that complete an option of the group `data`, which leaves some to its user."""

from typing import Any

from omegaconf import MISSING, OmegaConf

from conf.composition.compose import compose_groups

PLACE = ["data.folder=corpus", "data.tokenizer=corpus/tokenizer"]
OPEN = {
    "local": ["data.train=corpus/train"],
    "text": ["data.train.text.input.files=my.jsonl"],
    "images": ["data.train.images.input.files=my.jsonl"],
    "chats": ["data.train.chats.input.files=my.jsonl"],
}


def open_weights(option: str) -> list[str]:
    """Return the keys of the weights that data=<option> leaves open (???)."""
    if option in OPEN:
        return []
    train: Any = OmegaConf.to_container(compose_groups([f"data={option}"]).data.train)
    return [f"data.train.{name}.weight" for name, source in train.items() if source.get("weight") == MISSING]


def complete_data(option: str) -> list[str]:
    """Return overrides that choose data=<option> and give whatever it leaves open."""
    return [f"data={option}", *PLACE, *OPEN.get(option, []), *(f"{key}=1" for key in open_weights(option))]

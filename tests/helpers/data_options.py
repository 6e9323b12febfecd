"""Command-line values that complete an option of the group `data`, which leaves some to its user."""

from conf.compose import compose_groups

PLACE = ["data.folder=corpus", "data.tokenizer=corpus/tokenizer"]
OPEN = {
    "local": ["data.train=corpus/train"],
    "text": ["data.train.text.input.files=my.jsonl"],
    "chats": ["data.train.chats.input.files=my.jsonl"],
}


def open_weights(option: str) -> list[str]:
    """Keys of the weights that data=<option> leaves open (???)."""
    train = compose_groups([f"data={option}"]).data._get_node("train")
    if option in OPEN or isinstance(train._value(), str):
        return []
    return [f"data.train.{name}.weight" for name in train if train[name]._get_node("weight")._is_missing()]


def complete_data(option: str) -> list[str]:
    """Overrides that choose data=<option> and give whatever it leaves open."""
    return [f"data={option}", *PLACE, *OPEN.get(option, []), *(f"{key}=1" for key in open_weights(option))]

"""Images of records find their places and their files, or one message says what does not fit."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conf.system.errors import UserError
from data_pipeline.chat.template import load_chat_template
from data_pipeline.toy.tokenizer import train_tokenizer
from model.commands.prompt_records import EncodedPrompt, encode_prompt_record, lacks_response
from model.convert.image_vocabulary import name_image_tokens
from model.export.load import load_export_tokenizer
from model.hf.image_tokens import Grid, list_image_tokens
from tests.helpers.tiny_exports import TEXT, VOCAB_SIZE

START = "<|image_start|>"


@dataclass(frozen=True)
class Opened:
    """An image as wide as its source is long."""

    source: Any

    @property
    def grid(self) -> Grid:
        return 1, len(str(self.source))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    made = train_tokenizer([TEXT], VOCAB_SIZE)
    made.chat_template = load_chat_template(folder, "chatml")
    made.save_pretrained(folder)
    name_image_tokens(folder)
    return load_export_tokenizer(folder)


def encode(tokenizer: Any, record: dict[str, Any], folder: Path = Path(), read_image: Any = Opened) -> EncodedPrompt:
    return encode_prompt_record(record, "here:1", tokenizer, prompt_tokens=3, folder=folder, read_image=read_image)


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


ONE = {"type": "image_url", "image_url": {"url": "data:a"}}
TWO = {"type": "image", "image": "data:bb"}
SAME = [
    {"messages": user(ONE, text("the sea"), TWO, text("why?"))},
    {
        "messages": user({"type": "image"}, text("the sea"), {"type": "image"}, text("why?")),
        "images": ["data:a", "data:bb"],
    },
    {
        "messages": [{"role": "user", "content": f"{START}the sea{START}why?"}],
        "images": ["data:a", {"bytes": "data:bb"}],
    },
    {"messages": user(ONE, text(f"the sea{START}why?")), "images": ["data:bb"]},
    {"texts": [{"user": f"{START}the sea{START}why?", "assistant": "Because."}], "images": ["data:a", "data:bb"]},
]


@pytest.mark.parametrize("record", SAME, ids=["parts", "places", "text", "both", "pairs"])
def test_images_take_their_places_in_the_order_of_the_text(tokenizer: Any, record: dict[str, Any]) -> None:
    found = encode(tokenizer, record)
    assert [image.source for image in found.images] == ["data:a", "data:bb"]  # pyright: ignore[reportAttributeAccessIssue]
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{START}the sea{START}why?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    grids = iter([(1, 6), (1, 7)])
    expected = [new for t in template for new in (list_image_tokens(next(grids)) if t == 18 else [t])]
    assert found.token_ids == expected


def test_images_without_a_place_stand_before_what_the_user_says_first(tokenizer: Any) -> None:
    turns = {"texts": [{"user": "the sea"}], "images": ["data:a", "data:bb"]}
    placed = {"messages": user(ONE, TWO, text("the sea"))}
    assert encode(tokenizer, turns).token_ids == encode(tokenizer, placed).token_ids
    prompt = encode(tokenizer, {"prompt": "the sea", "images": ["data:a"]})
    assert prompt.token_ids == [*list_image_tokens((1, 6)), *tokenizer("the sea")["input_ids"]]
    system = [{"role": "system", "content": "wide"}, *turns["texts"]]
    messages = [system[0], {"role": "user", "content": "the sea"}]
    ids = encode(tokenizer, {"messages": messages, "images": ["data:a"]}).token_ids
    assert ids.index(18) > ids.index(11), "not in the system message"


def test_a_chat_without_images_is_encoded_as_before(tokenizer: Any) -> None:
    plain = [{"role": "user", "content": "the sea"}]
    assert encode(tokenizer, {"messages": user(text("the "), text("sea"))}) == encode(tokenizer, {"messages": plain})
    assert encode(tokenizer, {"messages": plain}, read_image=None) == encode(tokenizer, {"messages": plain})


def test_paths_are_relative_to_the_file_of_the_record(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    words = base64.b64encode(bytes(600)).decode()  # longer than any path
    record = {"prompt": "the sea", "images": ["a.png", f"file://{tmp_path}/a.png", words]}
    sources = [image.source for image in encode(tokenizer, record, tmp_path).images]  # pyright: ignore[reportAttributeAccessIssue]
    assert sources == [tmp_path / "a.png", tmp_path / "a.png", words]


def unreadable(source: Any) -> Any:
    raise ValueError(f"the image {source} cannot be read")


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"prompt": f"{START}a{START}", "images": ["x"]}, {}, r'1 images stand in "images", and 2 <\|image_start\|>'),
        ({"messages": user(ONE, text("a")), "images": ["x"]}, {}, '1 images stand in "images", and 0'),
        ({"prompt": START}, {}, r'0 images stand in "images", and 1'),
        ({"prompt": "<|image_pad|>", "images": []}, {}, "holds 1 tokens of images already"),
        ({"prompt": "a", "images": "x.png"}, {}, '"images" must be a list'),
        ({"prompt": "a", "images": [3]}, {}, "an image must be a path, a data: address or base64, not 3"),
        ({"prompt": "a", "images": ["https://x/y.png"]}, {}, "is on the web: download it"),
        ({"prompt": "a", "images": ["x"]}, {"read_image": None}, "has images, but the checkpoint reads text alone"),
        ({"prompt": "a", "images": ["x"]}, {"read_image": unreadable}, "here:1: the image x cannot be read"),
        ({"text": "a", "images": ["x"]}, {}, '"images" beside "text"'),
        ({"messages": user({"type": "audio"})}, {}, "a part of a message is neither text nor image"),
        ({"texts": ["a"]}, {}, '"texts" must be a list of objects with user and assistant'),
        ({"messages": user()}, {}, "content of the last message is empty"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_one_clear_error(tokenizer: Any, record: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode(tokenizer, record, **options)


def test_turns_lack_a_response_where_the_last_one_does() -> None:
    assert lacks_response({"texts": [{"user": "a", "assistant": "b"}, {"user": "c"}]})
    assert not lacks_response({"texts": [{"user": "a", "assistant": "b"}]})

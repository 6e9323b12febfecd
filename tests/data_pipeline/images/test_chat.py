"""Records of every form become the same chat, and those whose pictures cannot be found have a reason."""

import base64
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.encoder import Skip
from data_pipeline.images.chat import PicturedChat, read_pictured_chat
from data_pipeline.images.sources import LARGEST_IMAGES_BYTES
from tests.helpers.pictures import ask, make_picture

FIRST, SECOND = make_picture(seed=1), make_picture(seed=2)
TEXT = base64.b64encode(FIRST).decode()
IMAGE = {"type": "image"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(FIRST)
    return tmp_path


def read(value: Any, folder: Path | None = None) -> PicturedChat:
    chat = read_pictured_chat(value, folder)
    assert isinstance(chat, PicturedChat), chat
    return chat


def show(value: Any, folder: Path | None = None) -> tuple[list[str], list[bytes]]:
    """Return the contents of a chat with its pictures in their places, and the pictures."""
    chat = read(value, folder)
    inserted = chat.insert(chat.messages, "#")
    return [message["content"] for message in inserted], [picture.data for picture in chat.pictures]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "pictures/a.png"},
        {"type": "image", "image": "pictures/a.png"},
        {"type": "image", "url": "pictures/a.png"},
        {"type": "image", "image": TEXT},
        {"type": "image", "base64": TEXT},
        {"type": "image", "image": {"bytes": FIRST, "path": None}},
        {"type": "image", "image": {"bytes": None, "path": "pictures/a.png"}},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{TEXT}", "detail": "low"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{TEXT}"},
        {"type": "image_url", "image_url": {"url": "pictures/a.png"}},
        {"type": "image_url", "image_url": {"url": TEXT}},
    ],
    ids=lambda part: str({key: str(value)[:30] for key, value in part.items()}),
)
def test_a_part_names_its_picture_in_many_ways(part: dict[str, Any], folder: Path) -> None:
    assert show({"messages": ask("See ", part, " here")}, folder) == (["See # here", "It is green."], [FIRST])


def test_paths_may_be_absolute_and_files_addressed(folder: Path) -> None:
    for path in (str(folder / "pictures/a.png"), f"file://{folder}/pictures/a.png", "file://pictures/a.png"):
        assert show({"messages": ask({"type": "image", "path": path})}, folder)[1] == [FIRST]


@pytest.mark.parametrize(
    "messages",
    [
        ask(IMAGE, "One, ", IMAGE, "two."),
        ask({"type": "image_url"}, "One, ", IMAGE, "two."),
        ask("<image>One, <image>two."),
        [{"role": "user", "content": "<image>One, <image>two."}, {"role": "assistant", "content": "It is green."}],
    ],
)
@pytest.mark.parametrize("images", [[{"bytes": FIRST}, {"bytes": SECOND}], [FIRST, SECOND]])
def test_pictures_beside_the_messages_take_the_place_of_placeholders(messages: Any, images: Any) -> None:
    assert show({"messages": messages, "images": images}) == (["#One, #two.", "It is green."], [FIRST, SECOND])


def test_a_picture_beside_the_messages_need_not_be_a_list() -> None:
    assert show({"messages": ask(IMAGE), "images": {"bytes": FIRST}})[1] == [FIRST]


def test_parts_with_pictures_and_placeholders_may_be_mixed() -> None:
    messages = ask({"type": "image", "base64": TEXT}, IMAGE, "<image>")
    assert show({"messages": messages, "images": [SECOND]}) == (["##<image>", "It is green."], [FIRST, SECOND])


def test_pictures_may_come_in_any_turn_but_not_in_a_response() -> None:
    later = [*ask("Hello"), *ask(IMAGE, "And here?"), *ask("Thanks", IMAGE)]
    contents, pictures = show({"messages": later, "images": [FIRST, SECOND]})
    assert [contents[i] for i in (0, 2, 4)] == ["Hello", "#And here?", "Thanks#"] and pictures == [FIRST, SECOND]
    shown = [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": [IMAGE]}]
    skip = read_pictured_chat({"messages": shown, "images": [FIRST]}, None)
    assert skip == Skip("image in a response", "message 2")


def test_turns_of_finevision_are_messages_whose_pictures_come_first() -> None:
    turns = [{"user": "What?", "assistant": "<image> is a tag."}, {"user": "And?", "assistant": "No."}]
    contents, pictures = show({"messages": turns, "images": [{"bytes": FIRST}, {"bytes": SECOND}]})
    assert contents == ["##What?", "<image> is a tag.", "And?", "No."] and pictures == [FIRST, SECOND]
    assert [message["role"] for message in read({"messages": turns}).messages] == ["user", "assistant"] * 2
    placed = [{"user": "What?", "assistant": "A."}, {"user": "And <image>?", "assistant": "No."}]
    assert show({"messages": placed, "images": [FIRST]})[0] == ["What?", "A.", "And #?", "No."]


def test_without_pictures_beside_them_a_placeholder_is_text() -> None:
    assert show({"messages": ask("The tag <image>")})[0][0] == "The tag <image>"
    assert read_pictured_chat({"messages": ask("The tag <image>"), "images": []}, None) == Skip(
        "images and placeholders do not match", "0 images, 1 placeholders"
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"messages": ask(IMAGE, "a")}, "images and placeholders do not match"),
        ({"messages": ask(IMAGE), "images": [FIRST, SECOND]}, "images and placeholders do not match"),
        ({"messages": ask("a"), "images": [FIRST]}, "images and placeholders do not match"),
        ({"messages": ask(IMAGE), "images": [None]}, "image is null"),
        ({"messages": ask(IMAGE), "images": [{"bytes": None, "path": None}]}, "image is null"),
        ({"messages": ask(IMAGE), "images": [7]}, "image is of no known kind"),
        ({"messages": ask(IMAGE), "images": [b""]}, "image is empty"),
        ({"messages": ask({"type": "image", "path": "http://a/b.png"})}, "image is on the network"),
        ({"messages": ask({"type": "image_url", "image_url": {"url": "https://a"}})}, "image is on the network"),
        ({"messages": ask({"type": "image", "path": "nowhere.png"})}, "image file not found"),
        ({"messages": ask({"type": "image", "path": "\0"})}, "image file not found"),
        ({"messages": ask({"type": "image", "path": "no where/" * 2000})}, "image is no base64"),
        ({"messages": ask({"type": "image", "path": "pictures"})}, "image file not found"),
        ({"messages": ask({"type": "image", "url": "data:image/png,abc"})}, "image is no base64"),
        ({"messages": ask({"type": "image", "base64": TEXT[:-3]})}, "image is no base64"),
        ({"messages": ask({"type": "image", "path": "large.png"})}, "images are too large"),
        (7, "not a list of messages"),
        (Skip("broken JSON"), "broken JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_has_a_reason(value: Any, reason: str, folder: Path) -> None:
    with open(folder / "large.png", "wb") as file:
        file.truncate(LARGEST_IMAGES_BYTES + 1)
    skip = read_pictured_chat(value, folder)
    assert isinstance(skip, Skip) and skip.reason == reason


@pytest.mark.parametrize("messages", [None, [], "text", [7], [{"role": "user", "content": [{"type": "video"}]}]])
def test_what_is_no_chat_is_left_to_the_checks_of_chats(messages: Any) -> None:
    assert read({"messages": messages}).messages == messages


def test_the_same_chat_is_the_same_in_every_form() -> None:
    turns = [{"user": "What?", "assistant": "It is green."}]
    forms = [
        {"messages": ask({"type": "image", "base64": TEXT}, "What?")},
        {"messages": ask(IMAGE, "What?"), "images": [FIRST]},
        {"messages": ask("<image>What?"), "images": [{"bytes": FIRST}]},
        {"messages": turns, "images": [FIRST]},
    ]
    identities = [read(form).identify() for form in forms]
    assert all(identity == identities[0] for identity in identities)
    other = read({"messages": turns, "images": [SECOND]}).identify()
    assert other != identities[0]

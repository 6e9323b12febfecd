"""Chats with images become segments in which each image has its tokens; what cannot is left out or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conf.system.errors import UserError
from data_pipeline.chat.template import load_image_chat_template
from data_pipeline.encoder import PicturedDocument, Skip
from data_pipeline.images.chat import PicturedChat, read_pictured_chat
from data_pipeline.images.encoder import ImageChatEncoder, build_image_chat_encoder
from data_pipeline.toy.tokenizer import MASK_TOKEN
from model.hf.image_processing_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMImageProcessor
from model.hf.image_tokens import IMAGE_TOKENS, check_image_tokens, list_image_tokens
from model.hf.processing_nemotron_labs_diffusion_vlm import NemotronLabsDiffusionVLMProcessor
from tests.helpers.pictures import UNUSABLE, USABLE, ask, make_picture

IMAGE = {"type": "image"}
PICTURES = [make_picture(40, 30), make_picture(100, 20, 1), make_picture(28, 28, 2)]
GRIDS = [(2, 2), (1, 4), (1, 1)]


@pytest.fixture(scope="module")
def encoder(image_tokenizer_dir: Path) -> ImageChatEncoder:
    return build_image_chat_encoder(image_tokenizer_dir, MASK_TOKEN, "chatml")


def encode(encoder: ImageChatEncoder, messages: list[dict[str, Any]], images: list[bytes]) -> PicturedDocument | Skip:
    chat = read_pictured_chat({"messages": messages, "images": images}, None)
    assert isinstance(chat, PicturedChat)
    [document] = encoder.encode([chat])
    return document


def test_every_prompt_holds_the_tokens_of_its_images(encoder: ImageChatEncoder) -> None:
    messages = [*ask(IMAGE, "One", IMAGE), *ask("No"), *ask("Three ", IMAGE)]
    document = encode(encoder, messages, PICTURES)
    assert isinstance(document, PicturedDocument)
    assert [image.segment for image in document.images] == [0, 0, 4]
    assert [image.grid for image in document.images] == GRIDS
    assert [image.data for image in document.images] == PICTURES
    for segment, grids in zip(document.segments, (GRIDS[:2], [], [], [], GRIDS[2:], []), strict=True):
        check_image_tokens(segment, grids)
    start = document.segments[0].index(18)
    assert document.segments[0][start : start + 7] == list_image_tokens((2, 2))


def test_a_prompt_has_the_tokens_that_decoding_gives_it(
    encoder: ImageChatEncoder, image_tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(image_tokenizer_dir)
    template = load_image_chat_template(image_tokenizer_dir, "chatml")
    processor = NemotronLabsDiffusionVLMProcessor(NemotronLabsDiffusionVLMImageProcessor(), tokenizer, template)
    for number, data in enumerate(PICTURES):
        (tmp_path / f"{number}.png").write_bytes(data)
    parts = [{"type": "image", "path": str(tmp_path / f"{number}.png")} for number in range(3)]
    messages = ask(parts[0], "One", parts[1], "and", parts[2])
    decoded: Any = processor.apply_chat_template(
        messages[:1], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    chat = read_pictured_chat({"messages": messages}, tmp_path)
    [document] = encoder.encode([chat])
    assert isinstance(document, PicturedDocument)
    assert decoded["input_ids"][0].tolist() == document.segments[0]


def test_chats_without_images_are_encoded_as_ever(encoder: ImageChatEncoder, image_tokenizer_dir: Path) -> None:
    from data_pipeline.chat.encoder import build_chat_encoder

    document = encode(encoder, ask("What is it?"), [])
    assert isinstance(document, PicturedDocument) and document.images == []
    [expected] = build_chat_encoder(image_tokenizer_dir, MASK_TOKEN, "chatml").encode([ask("What is it?")])
    assert document.segments == expected


@pytest.mark.parametrize("name", USABLE)
def test_unusual_pictures_are_used(encoder: ImageChatEncoder, name: str) -> None:
    data, grid, fixes = USABLE[name]
    document = encode(encoder, ask(IMAGE, "What?"), [data])
    assert isinstance(document, PicturedDocument)
    [image] = document.images
    assert (image.grid, set(image.fixes)) == (grid, fixes)


@pytest.mark.parametrize("name", [name for name in UNUSABLE if name != "empty"])
def test_a_chat_with_a_broken_picture_is_left_out(encoder: ImageChatEncoder, name: str) -> None:
    data, reason = UNUSABLE[name]
    document = encode(encoder, ask(IMAGE, "What?", IMAGE), [PICTURES[0], data])
    assert isinstance(document, Skip) and document.reason == reason


@pytest.mark.parametrize("token", [*IMAGE_TOKENS, "<|im_end|>"])
@pytest.mark.parametrize("where", ["prompt", "response"])
def test_a_chat_that_spells_a_reserved_token_is_left_out(encoder: ImageChatEncoder, token: str, where: str) -> None:
    messages = ask(IMAGE, token) if where == "prompt" else ask(IMAGE, response=f"It is {token}")
    document = encode(encoder, messages, [PICTURES[0]])
    assert isinstance(document, Skip) and document.reason == "spells a reserved token"


def test_an_empty_chat_a_missing_response_and_a_skip_keep_their_reasons(encoder: ImageChatEncoder) -> None:
    assert encode(encoder, ask(IMAGE)[:1], [PICTURES[0]]) == Skip("no response", "no message of the assistant")
    assert encoder.encode([Skip("broken JSON")]) == [Skip("broken JSON")]


def test_a_tokenizer_without_the_tokens_of_images_is_refused(tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no reserved token <\|image_start\|> with id 18.* the ids 18, 19, 20, 21"):
        build_image_chat_encoder(tokenizer_dir, MASK_TOKEN, "chatml")


def test_a_template_that_writes_no_images_is_refused(image_tokenizer_dir: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(image_tokenizer_dir, tmp_path / "own"))
    text = load_image_chat_template(own, "chatml")
    (tmp_path / "own.jinja").write_text(text.replace("'<|image_start|>'", "''"))
    with pytest.raises(UserError, match=r"does not write <\|image_start\|> for each image of a message"):
        build_image_chat_encoder(own, MASK_TOKEN, str(tmp_path / "own.jinja"))
    (tmp_path / "own.jinja").write_text(text.replace("part['text']", "part['text'] | tojson"))
    with pytest.raises(UserError, match="does not write"):
        build_image_chat_encoder(own, MASK_TOKEN, str(tmp_path / "own.jinja"))


def test_settings_hold_all_that_decides_tokens(encoder: ImageChatEncoder) -> None:
    settings = json.loads(json.dumps(encoder.settings()))
    assert settings["longest_edge"] == 1400 and "<|image_start|>" in settings["chat_template"]

"""A chat shows pictures to a model that reads images, and its responses are those of the model's own entry points."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoProcessor

from conf.system.errors import UserError
from model.chat.__main__ import main
from model.chat.chat_model import load_chat_model
from model.chat.session import ChatOptions, ChatSession
from model.chat.terminal import run_conversation
from model.hf.options import MODES
from tests.helpers.tiny_vlm import draw_picture, save_vlm_export


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save `vlm`, an export with images, and two pictures. Do not change them."""
    folder = tmp_path_factory.mktemp("chat")
    save_vlm_export(folder / "vlm")
    draw_picture(folder / "a.png", 50, 91)
    draw_picture(folder / "b.png", 80, 30, seed=1)
    return folder


def make_session(export: Path, mode: str = "linear") -> ChatSession:
    return ChatSession(load_chat_model(export, device="cpu"), ChatOptions(mode, max_new_tokens=12))


@pytest.mark.parametrize("mode", MODES)
def test_a_response_is_that_of_the_shipped_code(saved: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    images = [str(saved / "a.png"), str(saved / "b.png")]
    arguments = [str(saved / "vlm"), "--prompt", "the sea", "--mode", mode, "--max-new-tokens", "12", "--json"]
    assert main([*arguments, "--device", "cpu", "--image", images[0], "--image", images[1]]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == images
    processor: Any = AutoProcessor.from_pretrained(saved / "vlm", trust_remote_code=True)
    model: Any = AutoModel.from_pretrained(saved / "vlm", trust_remote_code=True, dtype=torch.float32)
    parts = [{"type": "image", "path": image} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "the sea"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    options = {"threshold": 0.9} if mode == "block_diffusion" else {}
    result = model.generate(**inputs, mode=mode, max_new_tokens=12, return_dict_in_generate=True, **options)
    tokens = result.output_ids[0, inputs["input_ids"].shape[1] :].tolist()
    text = processor.tokenizer.decode([token for token in tokens if token != 11])
    assert (found["text"], found["new_tokens"], found["num_forwards"]) == (text, len(tokens), result.num_forwards)


def test_pictures_stay_in_the_conversation_until_it_is_reset(saved: Path) -> None:
    session = make_session(saved / "vlm")
    assert session.attach(str(saved / "a.png")).endswith("a.png: 4 x 2 features, 13 tokens")
    first = session.ask("the sea")
    assert not session.attached and session.messages[0]["content"] == "<|image_start|>the sea"
    session.attach(str(saved / "b.png"))
    second = session.ask("why?")
    session.reset()
    without = session.ask("the sea")
    assert without.text != first.text, "the picture must matter"
    assert second.new_tokens > 0 and [m["content"] for m in session.messages[::2]] == ["the sea"]


def test_a_command_attaches_a_picture(saved: Path) -> None:
    console = Console(record=True, width=200)
    lines = iter([f"/image {saved / 'a.png'}", "the sea", "/image nowhere.png", "/exit"])
    session = make_session(saved / "vlm")
    run_conversation(session, console, lambda: next(lines))
    printed = console.export_text()
    assert "with your next message: " in printed and "13 tokens" in printed
    assert "the message: the image 'nowhere.png' cannot be read" in printed
    assert session.messages[0]["content"].startswith("<|image_start|>")


def test_what_does_not_fit_is_one_clear_error(saved: Path, export: Path) -> None:
    with pytest.raises(UserError, match="the message has images, but the checkpoint reads text alone"):
        make_session(export).attach(str(saved / "a.png"))
    session = make_session(saved / "vlm")
    with pytest.raises(UserError, match=r"the conversation: the prompt has 1 times <\|image_start\|> and 0 images"):
        session.ask("a <|image_start|> of the sea")
    assert session.messages == []

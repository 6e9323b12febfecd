"""A tokenizer with the family's reserved tokens, its chat encoder, and chats of every form."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_pipeline.chat.encoder import ChatEncoder, build_chat_encoder
from data_pipeline.chat.template import CHATML_PATH
from data_pipeline.toy.tokenizer import MASK_TOKEN, save_tokenizer, train_tokenizer

TEXTS = [f"What does function_{i}(x) do?\nIt returns x + {i}, which is the {i}th answer.\n" for i in range(40)]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwei\nGröße <&>"}}}

CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A function."}],
    "two turns with a system message": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does f do?"},
        {"role": "assistant", "content": "It adds.\n\nThen it returns."},
        {"role": "user", "content": "And g?\n"},
        {"role": "assistant", "content": "Größe, 数, 🎉."},
    ],
    "thinking": [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "reasoning_content": "One and one.", "content": "2"},
        {"role": "user", "content": "And 1 + 2?"},
        {"role": "assistant", "thinking": "Two and one.", "content": "3"},
    ],
    "thinking written out": [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\n2"},
    ],
    "tools": [
        {"role": "user", "content": "Add them."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Again.", "tool_calls": [CALL, {"name": "add", "arguments": '{"a": 2}'}]},
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5."},
    ],
    "starts with the assistant": [
        {"role": "assistant", "content": "How can I help?"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "Hello?"},
    ],
    "text in parts": [
        {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A function."}]},
    ],
}


@pytest.fixture(params=list(CHATS), ids=lambda name: name.replace(" ", "_"))
def chat(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Return every form of a usable chat."""
    return CHATS[request.param]


@pytest.fixture(scope="session")
def base_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tokenizer without a chat template; tests must not write to it."""
    directory = tmp_path_factory.mktemp("tokenizer") / "base"
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=400), directory)
    return directory


@pytest.fixture(scope="session")
def chat_tokenizer(base_tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer with transformers and give it the packaged template."""
    tokenizer = AutoTokenizer.from_pretrained(base_tokenizer_dir)
    tokenizer.chat_template = CHATML_PATH.read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="session")
def encoder(base_tokenizer_dir: Path) -> ChatEncoder:
    built = build_chat_encoder(base_tokenizer_dir, MASK_TOKEN, "chatml")
    assert isinstance(built, ChatEncoder)
    return built

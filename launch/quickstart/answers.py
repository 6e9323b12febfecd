"""Last phase: the instruct export answers held-out questions, through the command a user would type."""

import json

from conf.system.atomic import atomic_write_text
from launch.quickstart.folder import QuickstartFolder
from launch.quickstart.processes import chat_command, read_output
from model.evaluate.records import AR, BLOCK_DIFFUSION, LINEAR

# One question per mode that the quickstart measures, of the held-out chats.
MODES = (AR, BLOCK_DIFFUSION, LINEAR)
MAX_NEW_TOKENS = 96


def write_answers(folder: QuickstartFolder) -> None:
    """{"answers": [{prompt, text, mode, ...}]}, as `python -m model.chat --json` gives them. Raises UserError."""
    answers = [
        json.loads(read_output("the chat", chat_command(folder.instruct, prompt, mode, MAX_NEW_TOKENS)))
        for prompt, mode in zip(read_questions(folder, len(MODES)), MODES, strict=True)
    ]
    atomic_write_text(folder.answers, json.dumps({"answers": answers}, indent=2) + "\n")


def read_questions(folder: QuickstartFolder, count: int) -> list[str]:
    """The first question of `count` held-out chats without a system message, spread over all of them."""
    lines = (folder.text / "heldout_chats.jsonl").read_text(encoding="utf-8").splitlines()
    first = [json.loads(line)["messages"][0] for line in lines]
    questions = [message["content"] for message in first if message["role"] == "user"]
    return questions[:: len(questions) // count][:count]

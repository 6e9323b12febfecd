"""Chat with an exported checkpoint, or get one response: `python -m model.chat DIR`.

Torch and transformers are imported after the command line has been checked.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from conf.system.entry import OneLineParser, exit_status
from conf.system.errors import UserError
from model.commands.decoding_options import (
    add_choice_options,
    add_length_options,
    add_place_options,
    check_modes,
    check_sampling,
)
from model.commands.prompt_records import check_text
from model.hf.options import LINEAR, MODES

if TYPE_CHECKING:
    from model.chat.session import ChatSession

DEFAULT_MODE, DEFAULT_MAX_NEW_TOKENS = LINEAR, 1024
EXAMPLES = """examples:
  # a conversation; /image FILE, /reset, /mode NAME, /exit; Ctrl-C ends a response, Ctrl-D the chat
  python -m model.chat exports/nld_8b_sft --mode quadratic

  # one response
  python -m model.chat exports/nld_8b_sft --prompt "Why is the sky blue?" --mode block_diffusion --threshold 0.8

  # one response to pictures and a question
  python -m model.chat exports/nld_8b_vlm --image before.png --image after.png --prompt "What has changed?"

  # one response as a JSON object, the prompt from standard input
  python -m model.chat exports/nld_8b_sft --prompt - --json < question.txt

Code in the directory is not executed: its weights, tokenizer and chat template are used with this repository's model.
A response ends at the checkpoint's eos, at --max-new-tokens, or when the model has no positions left.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 2 after an error message, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(options))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line; an option that is left out has the default of the model's entry points."""
    parser = OneLineParser(
        prog="python -m model.chat",
        description="Chat with an exported checkpoint; text appears as it is committed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("export", type=Path, metavar="DIR", help="exported checkpoint with a chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--prompt", metavar="TEXT", help="respond to this and exit; - reads standard input")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="picture that the prompt, or the first message, begins with; give it again for more",
    )
    parser.add_argument("--json", action="store_true", help="with --prompt: print one JSON object and nothing else")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--mode", choices=MODES, default=DEFAULT_MODE, help="default: %(default)s")
    add_length_options(decoding, DEFAULT_MAX_NEW_TOKENS)
    add_choice_options(decoding)
    place = parser.add_argument_group("model")
    add_place_options(place)
    place.add_argument("--no-adapter", action="store_true", help="draft without the adapter in linear_spec_lora/")
    return parser


def _run(options: argparse.Namespace) -> None:
    try:
        _chat(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter still flushes at exit
        raise UserError("nobody reads standard output any more") from None


def _chat(options: argparse.Namespace) -> None:
    check_sampling(options)
    prompt = _read_prompt(options)
    import torch

    from model.chat.chat_model import load_chat_model
    from model.chat.session import ChatOptions, ChatSession

    console = Console(highlight=False, soft_wrap=True)
    chat_model = load_chat_model(
        options.export, dtype=options.dtype, device=options.device, use_adapter=not options.no_adapter
    )
    chat_options = ChatOptions(
        mode=options.mode,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        block_length=options.block_length,
        threshold=options.threshold,
        top_k=options.top_k,
        top_p=options.top_p,
        mask_groups=options.mask_groups,
        thinking_budget=options.thinking_budget,
    )
    session = ChatSession(chat_model, chat_options, options.system)
    attached = [session.attach(image) for image in options.image]
    if options.seed is not None:
        torch.manual_seed(options.seed)
    if prompt is None:
        adapter = ", draft adapter" if chat_model.has_adapter else ""
        _converse(session, console, f"{options.export} on {chat_model.model.device}{adapter}", attached)
    elif options.json:
        print(respond_as_json(session, prompt), flush=True)
    else:
        _respond_once(session, console, prompt)


def _read_prompt(options: argparse.Namespace) -> str | None:
    """Return the prompt, or None for a conversation. Raises: UserError if it is empty or options contradict it."""
    if options.prompt is None:
        if options.json:
            raise UserError("--json needs --prompt")
        return None
    check_modes(options, [options.mode], "block_length")  # a conversation may change its mode
    try:
        prompt = sys.stdin.read().removesuffix("\n") if options.prompt == "-" else options.prompt
    except UnicodeDecodeError:
        raise UserError("the prompt on standard input is not UTF-8 text") from None
    return check_text(prompt, "the prompt")


def _converse(session: "ChatSession", console: Console, what: str, attached: list[str]) -> None:
    from model.chat.terminal import COMMANDS, run_conversation

    console.print(f"{what} · mode {session.options.mode} · {COMMANDS}", style="dim", markup=False)
    for image in attached:
        console.print(f"with your first message: {image}", style="dim", markup=False)
    run_conversation(session, console, _line_reader(console))


def _line_reader(console: Console) -> Callable[[], str]:
    """Return `input` with a prompt whose width line editing knows."""
    if not (console.is_terminal and sys.stdin.isatty()):
        return lambda: input("> ")
    import readline  # noqa: F401 (arrow keys and history)

    return lambda: input("\001\033[1m\002> \001\033[0m\002")


def _respond_once(session: "ChatSession", console: Console, prompt: str) -> None:
    """Write the text to standard output and its numbers to standard error."""
    from model.chat.terminal import build_writer, describe_response

    response = session.ask(prompt, build_writer(console))
    print(flush=True)
    Console(stderr=True, highlight=False, soft_wrap=True).print(describe_response(response), style="dim")


def respond_as_json(session: "ChatSession", prompt: str) -> str:
    """Return one JSON object: prompt, images, text, mode, counts, rates, and why the response ended."""
    images = [str(image.source) for image in session.attached]
    response = session.ask(prompt)
    values = {
        "prompt": prompt,
        "images": images,
        "text": response.text,
        "mode": response.mode,
        "new_tokens": response.new_tokens,
        "num_forwards": response.num_forwards,
        "tokens_per_forward": response.tokens_per_forward,
        "seconds": response.seconds,
        "tokens_per_second": response.tokens_per_second,
        "stopped": response.stopped,
    }
    return json.dumps(values, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())

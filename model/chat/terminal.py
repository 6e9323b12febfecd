"""Runs a conversation in a terminal: prompt line, streamed responses, commands."""

from collections.abc import Callable

from rich.console import Console

from conf.system.errors import UserError
from model.chat.session import ChatResponse, ChatSession
from model.hf.options import MODES

COMMANDS = "/image FILE, /reset, /mode NAME, /exit"
# Characters that would control the terminal; new line and tab are text.
_CONTROL = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}


def run_conversation(session: ChatSession, console: Console, read_line: Callable[[], str]) -> None:
    """Respond to lines until /exit or the end of input, where `read_line` raises EOFError as `input` does."""
    while True:
        try:
            line = read_line().strip()
            if line == "/exit":
                return
            if line.startswith("/"):
                console.print(_run_command(session, line), style="dim", markup=False)
            elif line:
                _respond(session, console, line)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\nleave with /exit or Ctrl-D", style="dim")
        except UnicodeDecodeError:
            console.print("error: the input is not UTF-8 text", style="red")
        except UserError as error:
            console.print(f"error: {error}", style="red", markup=False)


def _run_command(session: ChatSession, line: str) -> str:
    """Run a command and return the line to print. Raises: UserError for an unknown one."""
    command, _, argument = line.partition(" ")
    if command == "/reset" and not argument:
        session.reset()
        return "new conversation"
    if command == "/mode":
        if argument:
            session.set_mode(argument.strip())
        return f"mode {session.options.mode} (of {', '.join(MODES)})"
    if command == "/image" and argument:
        return f"with your next message: {session.attach(argument.strip())}"
    raise UserError(f"there is no command {line!r}: commands are {COMMANDS}")


def _respond(session: ChatSession, console: Console, prompt: str) -> None:
    """Stream one response and its numbers; Ctrl-C ends the response, not the chat."""
    try:
        response = session.ask(prompt, build_writer(console))
    except KeyboardInterrupt:
        console.print("\ninterrupted", style="dim")
        return
    console.print(f"\n{describe_response(response)}", style="dim")


def build_writer(console: Console) -> Callable[[str], None]:
    """Return a function that writes text immediately; a terminal gets no characters that would control it."""

    def write(text: str) -> None:
        console.file.write(text.translate(_CONTROL) if console.is_terminal else text)
        console.file.flush()

    return write


def describe_response(response: ChatResponse) -> str:
    """Format the numbers of one response in a line."""
    cut = " · cut at the length limit" if response.stopped == "length" else ""
    return (
        f"{response.new_tokens} tokens · {response.num_forwards} forwards · "
        f"{response.tokens_per_forward:.2f} tokens/forward · {response.tokens_per_second:.0f} tokens/s{cut}"
    )

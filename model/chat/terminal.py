"""The conversation in a terminal: prompt line, streamed answers, commands."""

from collections.abc import Callable

from rich.console import Console

from conf.system.errors import UserError
from model.chat.session import Answer, ChatSession
from model.hf.options import MODES

COMMANDS = "/reset, /mode NAME, /exit"
# Characters that would steer the terminal; new line and tab are text.
_CONTROL = {code: "\ufffd" for code in (*range(9), *range(11, 32), *range(127, 160))}


def run_conversation(session: ChatSession, console: Console, read_line: Callable[[], str]) -> None:
    """Answer lines until /exit or the end of the input. read_line: raises EOFError at its end, as `input` does."""
    while True:
        try:
            line = read_line().strip()
            if line == "/exit":
                return
            if line.startswith("/"):
                console.print(_obey(session, line), style="dim", markup=False)
            elif line:
                _answer(session, console, line)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\nleave with /exit or Ctrl-D", style="dim")
        except UnicodeDecodeError:
            console.print("error: the input is not UTF-8 text", style="red")
        except UserError as error:
            console.print(f"error: {error}", style="red", markup=False)


def _obey(session: ChatSession, line: str) -> str:
    """Carry out a command; returns what to tell. Raises: UserError for an unknown one."""
    command, _, argument = line.partition(" ")
    if command == "/reset" and not argument:
        session.reset()
        return "the conversation begins anew"
    if command == "/mode":
        if argument:
            session.set_mode(argument.strip())
        return f"mode {session.options.mode} (of {', '.join(MODES)})"
    raise UserError(f"there is no command {line!r}: commands are {COMMANDS}")


def _answer(session: ChatSession, console: Console, prompt: str) -> None:
    """Stream one answer and its numbers; Ctrl-C ends the answer, not the chat."""
    try:
        answer = session.ask(prompt, build_writer(console))
    except KeyboardInterrupt:
        console.print("\ninterrupted", style="dim")
        return
    console.print(f"\n{describe(answer)}", style="dim")


def build_writer(console: Console) -> Callable[[str], None]:
    """Writes pieces of text at once and as they are; to a terminal without characters that would steer it."""

    def write(text: str) -> None:
        console.file.write(text.translate(_CONTROL) if console.is_terminal else text)
        console.file.flush()

    return write


def describe(answer: Answer) -> str:
    """The numbers of one answer in a line."""
    cut = " · cut at the length limit" if answer.stopped == "length" else ""
    return (
        f"{answer.new_tokens} tokens · {answer.num_forwards} forwards · {answer.tokens_per_forward:.2f} tokens/forward"
        f" · {answer.tokens_per_second:.0f} tokens/s{cut}"
    )

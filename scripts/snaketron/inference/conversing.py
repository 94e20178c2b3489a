"""A conversation in a terminal: the lines of the user, commands among them, and answers as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from snaketron.inference.chat import Chat
from snaketron.log import UserError

FAINT, NORMAL = "\x1b[2m", "\x1b[0m"
COMMANDS = "/reset begins a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def converse(chat: Chat) -> None:
    """Answer one line after the other until the user ends it."""
    import readline  # noqa: F401  lets `input` edit a line and remember earlier ones

    print(COMMANDS)
    while True:
        try:
            text = input("> ").strip()
            if text == "/quit":
                return
            if text == "/reset":
                chat.reset()
            elif text == "/help":
                print(COMMANDS)
            elif text.startswith("/"):
                print(f"{text.split()[0]} is no command; there are /reset, /help and /quit")
            elif text:
                _answer(chat, text)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # stops an answer, or clears what is typed; the conversation stays
            print()


def _answer(chat: Chat, text: str) -> None:
    """Show the answer; where it calls functions, ask for their results and go on."""
    try:
        _show(chat, chat.say(text))
        while calls := chat.calls:
            results = [input(f"result of {name}> ") for name in calls]
            _show(chat, chat.say(*results, role="tool"))
    except UserError as error:
        print(error)
    except EOFError:  # no result; the next line is the user's
        print()


def _show(chat: Chat, pieces: Iterator[str]) -> None:
    show(pieces, chat.thinks)
    if chat.cut:
        print(f"{FAINT}… {chat.cut}{NORMAL}")


def show(pieces: Iterator[str], thinks: Callable[[str], bool] = lambda _: False) -> None:
    """Print an answer as it comes; faintly while an answer so far only `thinks`."""
    text = ""
    for piece in pieces:
        text += piece
        print(f"{FAINT}{piece}{NORMAL}" if thinks(text) else piece, end="", flush=True)
    print()

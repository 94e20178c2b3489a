"""Talk to a checkpoint in a terminal; or answer one prompt from standard input.

In a terminal: /reset begins a new conversation, /quit or Ctrl-D ends, and Ctrl-C stops an answer. Where the
model calls a function, its result is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.jobs.version import Version
from snaketron.log import UserError, logger, run

if TYPE_CHECKING:  # imports megatron-core (5 s)
    from snaketron.inference.chat import Chat

FAINT, NORMAL = "\x1b[2m", "\x1b[0m"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="such as ckpt/sft")
    parser.add_argument("--system", default="", help="the system's message")
    parser.add_argument(
        "--tools", type=Path, help="JSON file with a list of the functions that may be called"
    )
    parser.add_argument(
        "--template-arguments",
        type=json.loads,
        default={},
        help="JSON, such as '{\"enable_thinking\": true}'",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of the probability to draw from")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads")
    args = parser.parse_args(argv)
    if not Version(args.checkpoint).is_finished:
        raise UserError(f"{args.checkpoint}: not a finished checkpoint of this workflow")
    tools = _tools(args.tools) if args.tools else []
    interactive = sys.stdin.isatty()
    prompt = "" if interactive else sys.stdin.read().strip()
    if interactive:
        logger.info("opening %s", args.checkpoint)
    with _chat(args, tools) as chat:
        if interactive:
            _converse(chat)
        else:
            _print(chat.say(prompt), faint=False)
    return 0


def _tools(path: Path) -> list[Any]:
    try:
        tools = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; a JSON list of function schemas is expected") from None
    if not isinstance(tools, list):
        raise UserError(f"{path}: a JSON list of function schemas is expected")
    return tools


@contextlib.contextmanager
def _chat(args: argparse.Namespace, tools: list[Any]) -> Iterator[Chat]:
    from snaketron.data.chats.environment import special_tokens
    from snaketron.data.chats.mask import end_of_turn
    from snaketron.data.chats.template import load_template
    from snaketron.data.tokenizer import load_tokenizer, tokenizer_info
    from snaketron.inference.chat import Chat
    from snaketron.inference.decoder import decoding
    from snaketron.inference.generate import Sampling
    from snaketron.inference.opening import open_checkpoint
    from snaketron.model.distributed import distributed
    from snaketron.settings.training import RunSettings, template_date

    import yaml

    version = Version(args.checkpoint)
    directory = version.tokenizer
    tokenizer = load_tokenizer(directory)
    day = template_date(yaml.safe_load(version.config.read_text()))
    template = load_template(directory / "chat_template.jinja", special_tokens(directory), day=day)
    ends = end_of_turn(template, tokenizer), tokenizer_info(directory).eos_id
    settings = RunSettings(tracking="off", cpus_per_task=args.threads)
    with distributed(args.seed, settings):
        built = open_checkpoint(args.checkpoint, settings)
        with decoding(built, 1, built.settings.seq_length) as decoder:
            yield Chat(
                decoder=decoder,
                template=template,
                tokenizer=tokenizer,
                stop=[end for end in ends if end is not None],
                max_tokens=args.max_tokens,
                sampling=Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed),
                system=args.system,
                tools=tools,
                arguments=args.template_arguments,
            )


def _converse(chat: Chat) -> None:
    import readline  # noqa: F401  lets `input` edit a line and remember earlier ones

    print("/reset begins a new conversation, /quit ends, Ctrl-C stops an answer")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/"):
            print(f"{text.split()[0]} is no command; there are /reset and /quit")
        elif text:
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    """Print the answer; where it calls functions, ask for their results and go on."""
    try:
        _print(chat.say(text), faint=True)
        while calls := chat.calls:
            results = [input(f"result of {name}> ") for name in calls]
            _print(chat.say(*results, role="tool"), faint=True)
    except UserError as error:
        print(error)
    except (EOFError, KeyboardInterrupt):
        print()


def _print(pieces: Iterator[str], *, faint: bool) -> None:
    """Print an answer as it comes; in a terminal what it thinks is faint."""
    text = ""
    for piece in pieces:
        text += piece
        thinks = faint and text.lstrip().startswith("<think>") and "</think>" not in text
        print(f"{FAINT}{piece}{NORMAL}" if thinks else piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run(main)

"""Talk to a checkpoint in a terminal; or answer one prompt from standard input, however many lines it has.

In a terminal: /reset begins a new conversation, /quit or Ctrl-D ends, and Ctrl-C stops an answer. Where the
model calls a function, its result is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.jobs.version import Version
from snaketron.log import UserError, logger, run

if TYPE_CHECKING:  # imports megatron-core (5 s)
    from snaketron.inference.chat import Chat


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="directory of a checkpoint, such as ckpt/sft")
    parser.add_argument(
        "--system", default="", metavar="TEXT", help="message of the system, before all others"
    )
    parser.add_argument(
        "--tools",
        type=Path,
        metavar="FILE",
        help="JSON file with a list of the functions that the model may call",
    )
    parser.add_argument(
        "--template-arguments",
        type=_object,
        default={},
        metavar="JSON",
        help="what the chat template is told, such as '{\"enable_thinking\": true}'",
    )
    add_number = partial(parser.add_argument, metavar="N")
    add_number(
        "--temperature",
        type=_at_least_zero,
        default=0.0,
        help="how freely tokens are drawn (default: 0, always the most likely one)",
    )
    add_number(
        "--top-p",
        type=_share,
        default=1.0,
        help="draw from the likeliest tokens that have this share of the probability (default: 1, from all)",
    )
    add_number("--seed", type=_seed, default=0, help="what the draws begin with (default: 0)")
    add_number("--max-tokens", type=_positive, default=512, help="longest answer (default: 512 tokens)")
    add_number(
        "--threads",
        type=_positive,
        default=len(os.sched_getaffinity(0)),
        help="CPU threads (default: all CPUs, %(default)s here)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    Version(args.checkpoint).check_finished()
    tools = _tools(args.tools) if args.tools else []
    for stream in (sys.stdin, sys.stdout):  # a terminal may know less than the tokenizer, or send anything
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    interactive = sys.stdin.isatty()
    prompt = "" if interactive else sys.stdin.read().strip()
    if interactive:
        logger.info("opening %s", args.checkpoint)
    elif not prompt:
        raise UserError("standard input has no prompt")
    with _chat(args, tools) as chat:
        from snaketron.inference.conversing import converse, show

        if interactive:
            converse(chat)
        else:
            show(chat.say(prompt))
            if chat.cut:  # not on standard output, which holds the answer and nothing else
                logger.warning("the answer was %s", chat.cut)
    return 0


def _object(text: str) -> dict[str, Any]:
    """The JSON object in an option."""
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")


def _positive(text: str) -> int:
    return _number(text, int, lambda value: value > 0, "a whole number above 0")


def _seed(text: str) -> int:
    return _number(text, int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")


def _at_least_zero(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number from 0 on")


def _share(text: str) -> float:
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _number[T: (int, float)](text: str, kind: type[T], fits: Callable[[T], bool], what: str) -> T:
    """The number in an option; argparse puts the option's name before the message."""
    with contextlib.suppress(ValueError):
        if fits(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text} is not {what}")


_SCHEMA = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'


def _tools(path: Path) -> list[dict[str, Any]]:
    """The functions in a file; `UserError` where one is no object with a name."""
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: {why}; a JSON list of function schemas is expected") from None
    if not isinstance(tools, list):
        raise UserError(f"{path}: a JSON list of function schemas is expected")
    named = [(number, _problem(tool)) for number, tool in enumerate(tools, start=1)]
    if problems := [f"entry {number} {problem}" for number, problem in named if problem]:
        raise UserError(f"{path}: {', '.join(problems)}; each entry is a function: {_SCHEMA}")
    return tools


def _problem(tool: Any) -> str:
    """What is wrong with an entry of a list of functions; empty where it has a name."""
    if not isinstance(tool, dict):
        kinds = {str: "a text", list: "a list", type(None): "null", bool: "true or false"}
        return f"is {kinds.get(type(tool), 'a number')}"
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return "" if isinstance(name, str) and name else "has no name"


@contextlib.contextmanager
def _chat(args: argparse.Namespace, tools: list[Any]) -> Iterator[Chat]:
    from snaketron.data.chats.mask import end_of_turn
    from snaketron.data.tokenizer import load_tokenizer
    from snaketron.inference.chat import Chat
    from snaketron.inference.decoder import decoding
    from snaketron.inference.generate import Sampling
    from snaketron.inference.opening import open_checkpoint
    from snaketron.inference.prompting import ends_of_answers, template_of
    from snaketron.model.distributed import distributed
    from snaketron.settings.training import RunSettings

    version = Version(args.checkpoint)
    tokenizer, template = load_tokenizer(version.tokenizer), template_of(version)
    # The template's end of a turn counts also for a model that was not tuned on the template.
    ends = [*ends_of_answers(version), end_of_turn(template, tokenizer)]
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


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    run(main)

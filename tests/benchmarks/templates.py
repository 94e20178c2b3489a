"""Which published chat templates are taken, which are refused and why, and whether each mask is right.

    python tests/benchmarks/templates.py DIR [--verbose]

DIR holds templates (`*.jinja`); none lie in this repository. Each renders the conversations of `CASES` as
rule render_chat does, with a byte-level tokenizer that has the control tokens of the template. The texts of
the messages are unique words, so every mask is checked without the code that made it: by the words that the
trained tokens spell, and by what transformers' own environment renders for the same messages.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from snaketron.data.chats.mask import Masker
from snaketron.data.chats.render import Renderer
from snaketron.data.chats.template import Template
from snaketron.data.chats.unusable import Unusable
from snaketron.data.drops import Drops
from snaketron.log import UserError
from snaketron.settings.chats import RenderSettings

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import _compile_jinja_template

THINKING = re.compile(r"(?i)(?:<[^<>]*(?:think|thought|channel|reason)[^<>]*>|thought|\[/?THINK\]|\s)*")
OFF = {"enable_thinking": False}
VARIANTS: list[dict[str, Any]] = [{}, OFF, {"enable_thinking": True}, {"thinking": True}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
# What looks like a control token: <|x|> (also with full-width bars), <|x>, <x|>, [X], and some of their own.
BAR = "[|\uff5c]"
TOKEN = re.compile(
    rf"<{BAR}[^<>\n]{{1,40}}>|<[^<>|\n]{{1,30}}{BAR}>|\[/?[A-Z_]+\]|</?s>|<(?:start|end)_of_\w+>"
    r"|<seed:\w+>|\[e~\[|\[\|\w+\|\]| <step>"
)
UNIT = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\S")  # a tag, a word, a sign
TOKENS = ("<eos>", "<bos>", "<extra_id_1>", "<end>", "<sep>", "<eod>", "<CLS>", "<SEP>", "<EOD>")


def user(word: str) -> dict[str, Any]:
    return {"role": "user", "content": f"ask{word}?"}


def says(word: str, thought: str | None = None, calls: tuple[str, ...] = ()) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": f"say{word}." if word else ""}
    if thought:
        message["reasoning_content"] = f"think{thought}."
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call0000{number}",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": f"city{city}"}},
            }
            for number, city in enumerate(calls)
        ]
    return message


def result(word: str, number: int = 0) -> dict[str, Any]:
    content = json.dumps({"found": f"found{word}"})
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "weather", "content": content}


RULES = {"role": "system", "content": "rulezulu."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city."}},
                "required": ["city"],
            },
        },
    }
]
CALLED = [user("alpha"), says("", calls=("bravo",)), result("charlie"), says("delta")]
CASES: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "plain": ([user("alpha"), says("bravo")], None),
    "several turns": ([user("alpha"), says("bravo"), user("charlie"), says("delta")], None),
    "system": ([RULES, user("alpha"), says("bravo"), user("charlie"), says("delta")], None),
    "tools, no call": ([user("alpha"), says("bravo")], TOOLS),
    "call": (CALLED, TOOLS),
    "calls in turns": (
        [RULES, *CALLED, user("echo"), says("", calls=("golf",)), result("hotel"), says("india")],
        TOOLS,
    ),
    "two calls": (
        [
            user("alpha"),
            says("", calls=("bravo", "echo")),
            result("charlie"),
            result("golf", 1),
            says("delta"),
        ],
        TOOLS,
    ),
    "thinking": ([user("alpha"), says("bravo", "golf")], None),
    "thinking in turns": (
        [user("alpha"), says("bravo", "golf"), user("charlie"), says("delta", "hotel")],
        None,
    ),
    "thinking, call": (
        [user("alpha"), says("", "golf", ("bravo",)), result("charlie"), says("delta", "hotel")],
        TOOLS,
    ),
}
KINDS = (
    "accepted",
    "refused",
    "refused: the template fails on the conversation, or leaves out some of it",
    "refused: nothing ends an answer, so a model could not learn to stop",
    "WRONG",
)
WORDS = re.compile(r"(ask|say|think|city|found|rule)(alpha|bravo|charlie|delta|echo|golf|hotel|india|zulu)")


def theirs(
    source: str, messages: list[Any], tools: Any, prompt: bool, arguments: dict[str, Any]
) -> str | None:
    """What transformers renders; None where the template fails."""
    given = [m | ({"thinking": m["reasoning_content"]} if "reasoning_content" in m else {}) for m in messages]
    try:
        template = _compile_jinja_template(source)
        variables = {"messages": given, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        variables["strftime_now"] = datetime(2026, 1, 1).strftime
        variables["chat_template_kwargs"] = arguments  # where the template of Nemotron's recipe reads them
        return str(template.render(SPECIAL | variables | arguments))
    except Exception:  # a template may raise anything
        return None


def expected(messages: list[Any]) -> set[str]:
    """The words that the assistant says."""
    return {
        "".join(found.groups())
        for message in messages
        if message["role"] == "assistant"
        for found in WORDS.finditer(json.dumps(message))
    }


def can_write(source: str, messages: list[Any], tools: Any) -> bool:
    """Whether the template writes every word of the conversation but for thoughts, which many leave out."""
    words = {"".join(found.groups()) for found in WORDS.finditer(json.dumps(messages))}
    words = {word for word in words if not word.startswith("think")}
    forms = [messages, as_text(messages)]
    texts = [theirs(source, form, tools, False, arguments) or "" for form in forms for arguments in VARIANTS]
    return any(all(word in text for word in words) for text in texts)


def ends(source: str) -> bool:
    """Whether something ends an answer: what follows the last one, or a token before the next question."""
    for tools in (None, TOOLS):
        last = theirs(source, CASES["plain"][0], tools, False, {}) or ""
        two = theirs(source, CASES["several turns"][0], tools, False, {}) or ""
        between = two.rpartition("saybravo.")[2].partition("askcharlie")[0]
        if last.rpartition("saybravo.")[2].strip() or tokens_of(between):
            return True
    return False


def tokens_of(text: str) -> set[str]:
    """What looks like a control token in a text."""
    return set(TOKEN.findall(text)) | {token for token in TOKENS if token in text}


def as_text(messages: list[Any]) -> list[Any]:
    """The messages with the arguments of calls as JSON text, which a few templates want."""
    made = json.loads(json.dumps(messages))
    for call in (call for message in made for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return made


def build_tokenizer(source: str, folder: Path) -> Path:
    """A tokenizer of bytes, with what looks like a control token in the template or in what it writes."""
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = [(form, tools) for m, tools in CASES.values() for form in (m, as_text(m))]
    texts = [
        theirs(source, form, tools, prompt, {}) or "" for form, tools in made for prompt in (False, True)
    ]
    found = {token for text in texts for token in tokens_of(text)} | set(SPECIAL.values())
    tokenizer.add_special_tokens(sorted(found))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def render(source: str, name: str, folder: Path, files: dict[str, Path]) -> Iterator[tuple[str, Any]]:
    """For each case its sequences, or the message that refuses it."""
    try:
        template = Template(source, name=name, variables=SPECIAL, off_arguments=OFF)
        masker = Masker(build_tokenizer(source, folder))
    except UserError as error:
        yield from ((case, str(error)) for case in files)
        return
    fields = {"source": "s", "messages_field": "messages", "tools_field": "tools"}
    settings = RenderSettings.model_validate(
        fields | {"valid_fraction": 0, "test_fraction": 0, "max_dropped_fraction": 1}
    )
    for case, path in files.items():
        renderer, drops = Renderer(template, masker, settings), Drops()
        try:
            renderer.check_ends()
            made = [
                item for items in renderer.encode(renderer.render([path], drops), drops) for item in items
            ]
        except (UserError, Unusable) as error:
            yield case, str(error)
            continue
        yield (
            case,
            (made, masker.tokenizer) if made else f"{drops.listed[0]['reason']}: {drops.listed[0]['detail']}",
        )


def wrong(source: str, case: str, item: Any, tokenizer: Tokenizer) -> str:
    """What is wrong with a mask; empty when nothing is."""
    messages, tools = CASES[case]
    ids, mask = np.array(item.input_ids), np.array(item.loss_mask)
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
    trained = [tokenizer.decode(ids[run].tolist(), skip_special_tokens=False) for run in runs if mask[run[0]]]
    words = {"".join(found.groups()) for text in trained for found in WORDS.finditer(text)}
    said = expected(messages)
    if words - said:
        return f"trained: {sorted(words - said)}"
    if missing := {word for word in said - words if not word.startswith("think")}:
        return f"not trained: {sorted(missing)}"
    whole = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    written = {"".join(found.groups()) for found in WORDS.finditer(whole)}
    if missing := (said & written) - words:
        return f"written and not trained: {sorted(missing)}"
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for text in trained:
        if not text.rstrip().endswith(tuple(added)):
            return f"an answer ends without a token: {text[-40:]!r}"
    num_answers = sum(message["role"] == "assistant" for message in messages)
    if len(trained) > num_answers:
        return f"{len(trained)} trained parts for {num_answers} answers"
    if problem := trained_header(source, messages, tools, trained):
        return problem
    # The last answer must begin where a prompt for it ends.
    last = len(messages) - 1
    start = len(whole) - len(whole[whole.rfind(trained[-1]) :])
    for arguments in VARIANTS:
        for form in (messages, as_text(messages)):
            prompt = theirs(source, form[:last], tools, True, arguments)
            bare = theirs(source, form[:last], tools, False, arguments)
            header = prompt[len(bare) :].strip() if prompt and bare and prompt.startswith(bare) else ""
            thinks = THINKING.fullmatch(header)
            if header and not thinks and any(text.lstrip().startswith(header) for text in trained):
                return f"the prompt {header!r} is trained"
            if header and whole[:start].endswith(prompt[len(bare) :]):
                return ""  # the history may differ, as where it is shortened
            if prompt is not None and prompt.startswith(whole[:start]):
                rest = re.sub(
                    r"(?i)<[^<>]*(think|thought|channel|reason)[^<>]*>|thought|\[/?THINK\]",
                    "",
                    prompt[start:],
                )
                if not rest.strip():
                    return ""
    return f"no prompt ends where the last answer begins: {whole[:start][-50:]!r}"


def trained_header(source: str, messages: list[Any], tools: Any, trained: list[str]) -> str:
    """Whether some of what a prompt adds is trained: the end of it before an answer, or a token after one."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if len(answers) != len(trained):
        return ""  # no telling what part is of what answer
    for number, text in zip(answers, trained, strict=True):
        for form in (messages, as_text(messages)):
            bare, prompt = (theirs(source, form[:number], tools, asks, {}) for asks in (False, True))
            if not (bare and prompt and prompt.startswith(bare)):
                continue
            header = prompt[len(bare) :].strip()
            for part in (header[unit.start() :] for unit in UNIT.finditer(header)):
                if text.lstrip().startswith(part) and not THINKING.fullmatch(part):
                    return f"{part!r} of the prompt is trained"
            after = text[max((found.end() for found in WORDS.finditer(text)), default=0) :]
            # The last token of a prompt opens an answer; what is before it may end a question.
            opening = max(tokens_of(header), key=header.rfind, default="")
            if opening and opening in after and not THINKING.fullmatch(opening):
                return f"{opening!r} of the next prompt is trained"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="templates whose name holds this")
    parser.add_argument("--verbose", action="store_true", help="a line for each rendering that is refused")
    args = parser.parse_args()
    logging.disable()
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    by_case: dict[str, Counter[str]] = {case: Counter() for case in CASES}
    with tempfile.TemporaryDirectory() as directory:
        files = {}
        for number, (case, (messages, tools)) in enumerate(CASES.items()):
            files[case] = Path(directory) / f"{number}.jsonl"
            files[case].write_text(json.dumps({"messages": messages, "tools": tools}) + "\n")
        paths = [path for path in sorted(args.folder.glob("*.jinja")) if args.only in path.name]
        for path in paths:
            source = path.read_text(encoding="utf-8")
            for case, made in render(source, path.name, Path(directory) / "tokenizer", files):
                able = can_write(source, *CASES[case])
                if isinstance(made, str):
                    what = "refused" if able else KINDS[2]
                    what = what if ends(source) else KINDS[3]
                    said = made.removeprefix(f"{path.name}: ")
                    reasons[f"{what}: {re.sub(r'message [0-9]+', 'message', said)[:90]}"] += 1
                else:
                    items, tokenizer = made
                    said = next(filter(None, (wrong(source, case, item, tokenizer) for item in items)), "")
                    what = "WRONG" if said else "accepted"
                counts[what] += 1
                by_case[case][what] += 1
                if what == "WRONG" or (args.verbose and what == "refused"):
                    print(f"{what:8} {path.name:50} {case:18} {said[:400]}")
    total, able = sum(counts.values()), counts["accepted"] + counts["refused"] + counts["WRONG"]
    print(f"\n{len(paths)} templates, {total} renderings")
    for kind in KINDS:
        print(f"{counts[kind]:6} {kind}")
    print(
        f"{counts['accepted'] / total:.1%} of all, {counts['accepted'] / able:.1%} of what can be trained\n"
    )
    titles = ("accepted", "refused", "not written", "no end", "WRONG")
    print(f"{'':20}" + "".join(f"{title:>14}" for title in titles))
    for case, found in by_case.items():
        print(f"{case:20}" + "".join(f"{found[kind]:14}" for kind in KINDS))
    print()
    for reason, count in reasons.most_common(60):
        print(f"{count:5} {reason}")


if __name__ == "__main__":
    main()

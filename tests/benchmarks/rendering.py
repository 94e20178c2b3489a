"""How long rendering and masking take, against the recipe's way: render each prefix of a conversation.

    python tests/benchmarks/rendering.py

Conversations of 20 turns, with tools, calls and reasoning. The recipe renders a conversation up to each of
its messages with transformers, takes what is new as that message's, and tokenizes it; others tokenize each
prefix. `same code` is the renderer of this repository used that way: what is gained without a faster encoder
and template engine. Times are those of the processor, on one thread; the last table is rule render_chat.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = os.environ.get("TOKENIZERS_PARALLELISM", "false")
os.environ["RAYON_NUM_THREADS"] = os.environ["FASTOKENS_BPE_THREADS"] = "1"

from snaketron.data import tokenizer
from snaketron.data.chats import conversation, render
from snaketron.data.chats.mask import Masker
from snaketron.data.chats.sequences import num_tokens
from snaketron.data.chats.template import Template, load_template
from snaketron.data.sample import chats
from snaketron.settings.chats import RenderSettings
from snaketron.settings.tokenizer import TokenizerSettings

from tokenizers import Tokenizer

REPOSITORY = Path(__file__).parents[2]
TEMPLATES = {
    "generation blocks": REPOSITORY / "config/chat_template.jinja",
    "no generation blocks": REPOSITORY / "tests/unit/data/chats/other_template.jinja",
}
TURNS = 20
VOCAB_SIZE = 8192
OFF = {"enable_thinking": False}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup_docs",
        "description": "Look up a Python name.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}


def conversations(count: int) -> list[dict[str, Any]]:
    """Rows of `TURNS` turns about different parts of the standard library; every fourth turn calls a tool."""
    entries = chats._entries()
    rows = []
    for number in range(count):
        messages: list[dict[str, Any]] = [{"role": "system", "content": "You know Python well."}]
        for turn in range(TURNS):
            entry = entries[(number * TURNS + turn) % len(entries)]
            more = entries[(number * 7 + turn * 3) % len(entries)]
            messages.append({"role": "user", "content": f"What does {entry.name} do?"})
            if turn % 4 == 3:
                function = {"name": "lookup_docs", "arguments": {"name": entry.name}}
                calls = [{"id": "call_1", "type": "function", "function": function}]
                messages.append({"role": "assistant", "content": "", "tool_calls": calls})
                messages.append({"role": "tool", "tool_call_id": "call_1", "content": entry.doc})
            reasoning = (
                f"They ask about {entry.name}. It has to do with {more.name}: {more.doc} So I explain."
            )
            answer = f"{entry.doc}\n\nLike this: `{entry.name}{entry.signature}`"
            messages.append({"role": "assistant", "content": answer, "reasoning_content": reasoning})
        rows.append({"messages": messages, "tools": [TOOL]})
    return rows


def seconds(prepare: Callable[[], Callable[[], int]], repeats: int) -> tuple[float, int]:
    """The least of some times, each with an encoder that has seen nothing yet, and the tokens."""
    best, tokens = float("inf"), 0
    for _ in range(repeats):
        function = prepare()
        begin = time.process_time()
        tokens = function()
        best = min(best, time.process_time() - begin)
    return best, tokens


# ------------------------------------------------------------------------------------------- the ways


def ours(renderer: render.Renderer, path: Path) -> int:
    """Rows of a file to ids and masks, as rule render_chat does but for writing them; returns the tokens."""
    drops = render.Drops()
    return sum(num_tokens(made) for made in renderer.encode(renderer.render([path], drops), drops))


def by_prefixes(
    render: Callable[[list[Any], Any, bool], str],
    encode: Callable[[str], list[int]],
    rows: list[dict[str, Any]],
    *,
    each_prefix: bool,
) -> int:
    """Render each prefix; tokenize what it adds, or all of it; returns the tokens of whole conversations."""
    total = 0
    for row in rows:
        before = ""
        ids: list[int] = []
        for end in range(1, len(row["messages"]) + 1):
            messages = row["messages"][:end]
            asks = end < len(row["messages"]) and row["messages"][end]["role"] == "assistant"
            text = render(messages, row["tools"], asks)
            if each_prefix:
                ids = encode(text)
            else:
                ids += encode(text[len(before) :])
            before = text
        total += len(ids)
    return total


def turns_by_prefixes(render: Any, encode: Any, rows: list[dict[str, Any]]) -> int:
    """The recipe's way with reasoning: for each turn, each prefix of the conversation up to it."""
    parts = []
    for row in rows:
        found = conversation.Conversation(row["messages"], row["tools"])
        parts += [{"messages": row["messages"][:end], "tools": row["tools"]} for _, _, end in found.turns]
    return by_prefixes(render, encode, parts, each_prefix=False)


def table(name: str, path: Path, rows: list[dict[str, Any]], folder: Path, repeats: int) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(folder / "tokenizer.json")),
        chat_template=path.read_text(encoding="utf-8"),
    )
    template = load_template(path, off_arguments=OFF, arguments={"truncate_history_thinking": False})

    def hugging_face(messages: list[Any], tools: Any, asks: bool) -> str:
        return theirs.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=asks,
            truncate_history_thinking=False,
        )

    def same(messages: list[Any], tools: Any, asks: bool) -> str:
        return template.prompt(messages, tools) if asks else template.render(messages, tools).text

    def fresh() -> Callable[[str], list[int]]:
        encoder = tokenizer.load_tokenizer(folder)
        return lambda text: encoder.encode(text, add_special_tokens=False).ids

    def per_prefix(render: Any, each_prefix: bool) -> Callable[[], int]:
        encode = fresh()
        return lambda: by_prefixes(render, encode, rows, each_prefix=each_prefix)

    def per_turn() -> Callable[[], int]:
        encode = fresh()
        return lambda: turns_by_prefixes(hugging_face, encode, few)

    def whole(sequences: str, path: Path) -> Callable[[], int]:
        made = renderer(template, folder, sequences)
        return lambda: ours(made, path)

    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = rows[: max(1, len(rows) // 3)]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    print(f"\ntemplate with {name}: {len(rows)} conversations of {TURNS} turns")
    print(f"{'':58}{'s':>8}{'tokens/s':>12}{'ratio':>8}")
    base, tokens = seconds(lambda: whole("conversation", file), repeats)
    show("one sequence a conversation", base, tokens, base)
    ways = {
        "each prefix rendered and tokenized, same code": (same, True),
        "each prefix rendered and tokenized, transformers": (hugging_face, True),
        "each prefix rendered, its end tokenized, same code": (same, False),
        "each prefix rendered, its end tokenized, transformers": (hugging_face, False),
    }
    for label, way in ways.items():
        taken, _ = seconds(functools.partial(per_prefix, *way), repeats)
        show(label, taken, tokens, base)
    base, tokens = seconds(lambda: whole("turn", folder / "few.jsonl"), repeats)
    show(f"a sequence a turn ({len(few)} conversations)", base, tokens, base)
    taken, _ = seconds(per_turn, repeats)
    show("each prefix of each turn, its end tokenized, transformers", taken, tokens, base)


def renderer(template: Template, folder: Path, sequences: str) -> render.Renderer:
    made = RenderSettings.model_validate(settings(sequences))
    return render.Renderer(template, Masker(folder), made)


def settings(sequences: str = "conversation") -> dict[str, Any]:
    fields = {"source": "s", "messages_field": "messages", "tools_field": "tools"}
    return fields | {"valid_fraction": 0.01, "test_fraction": 0.01, "sequences": sequences}


def show(label: str, taken: float, tokens: int, base: float) -> None:
    print(f"{label:58}{taken:8.2f}{tokens / taken:12,.0f}{taken / base:8.1f}", flush=True)


def job(rows: list[dict[str, Any]], folder: Path) -> None:
    """Rule render_chat on one thread and on all."""
    file = folder / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"\nrule render_chat, {len(rows)} conversations, {file.stat().st_size / 1e6:.1f} MB")
    print(f"{'':58}{'s':>8}{'tokens/s':>12}{'MB/s':>8}")
    command = [sys.executable, REPOSITORY / "scripts/render_chat.py", "--chats", file, "--tokenizer", folder]
    command += ["--template", TEMPLATES["generation blocks"], "--settings", json.dumps(settings())]
    command += ["--output", folder / "out.parquet", "--record", folder / "out.json"]
    for threads, parallel in (("1", "false"), (str(os.cpu_count()), "true")):
        begin = time.perf_counter()
        environment = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": parallel}
        environment["FASTOKENS_BPE_THREADS"] = threads
        subprocess.run(command, check=True, env=os.environ | environment, stderr=subprocess.DEVNULL)
        taken = time.perf_counter() - begin
        tokens = json.loads((folder / "out.json").read_text())["counts"]["tokens"]
        megabytes = file.stat().st_size / 1e6
        print(f"{f'{threads} thread(s)':58}{taken:8.2f}{tokens / taken:12,.0f}{megabytes / taken:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--conversations", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        rows = conversations(args.conversations)
        texts = folder / "text.jsonl"
        lines = [json.dumps({"text": f"{e.name}\n\n{e.doc}"}) + "\n" for e in chats._entries()]
        texts.write_text("".join(lines))
        tokenizer.build(
            [texts],
            settings=TokenizerSettings(vocab_size=VOCAB_SIZE, text_field="text"),
            output=folder / "tokenizer.json",
            record=folder / "record.json",
        )
        added = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added.add_special_tokens(["<|turn|>", "<|stop|>"])
        added.save(str(folder / "tokenizer.json"))
        for name, path in TEMPLATES.items():
            table(name, path, rows, folder, args.repeats)
        job(conversations(30 * args.conversations), folder)


if __name__ == "__main__":
    main()

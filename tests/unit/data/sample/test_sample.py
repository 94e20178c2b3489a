"""The sample text and conversations: real, the same each time, and without paths of this machine."""

from __future__ import annotations

import collections
import itertools
import json
import re
import sys
from pathlib import Path

from snaketron import files
from snaketron.config import load
from snaketron.data import tokenizer
from snaketron.data.sample import chats as sample_chats
from snaketron.data.sample import requests as sample_requests
from snaketron.data.sample import text as sample

import pytest


def read(paths: list[Path]) -> list[dict]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    """All rows of the quick sources, and the first of the slow one."""
    return {
        "docs": list(sample.docs()),
        "code": list(sample.code()),
        "packages": list(itertools.islice(sample.packages(), 100)),
        "requests": list(sample.requests()),
        "questions": list(sample_chats.questions()),
        "tools": list(sample_requests.conversations()),
    }


def test_the_corpora_have_the_size_that_the_tiny_run_needs(rows):
    sizes = {name: sum(len(row["text"]) for row in rows[name]) for name in ("docs", "code")}
    assert 1_800_000 < sizes["docs"] < 4_000_000
    assert 7_000_000 < sizes["code"] <= 8_000_000
    assert max(len(row["text"]) for row in rows["code"]) < 200_000


@pytest.mark.parametrize("name", ["docs", "code", "packages", "requests", "questions", "tools"])
def test_rows_have_ids_of_their_own_and_no_path_of_this_machine(rows, name):
    ids = [row["id"] for row in rows[name]]
    assert len(set(ids)) == len(ids)
    text = json.dumps(rows[name])
    assert sys.prefix not in text and str(Path(__file__).parents[4]) not in text
    assert "snaketron" not in text


def test_code_is_the_source_in_order(rows):
    pieces = [row["text"] for row in rows["code"] if row["id"].startswith("code/argparse/")]
    assert len(pieces) > 3
    assert "".join(pieces) == Path(sys.modules["argparse"].__file__ or "").read_text(encoding="utf-8")


def test_a_decorator_stays_with_what_it_decorates(monkeypatch):
    monkeypatch.setattr(sample, "GROUP_BYTES", 25)
    source = "import a\n\n@one\n@two\ndef f():\n    pass\n\nclass C:\n    pass\n"
    assert list(sample.groups(source)) == [
        "import a\n\n@one\n@two\ndef f():\n    pass\n\n",
        "class C:\n    pass\n",
    ]


def test_docstrings_are_read_without_importing(tmp_path):
    source = tmp_path / "m.py"
    source.write_text(
        '"""What the module is about."""\nraise SystemExit\n'
        'def f(a, *, b=1):\n    """Do something with a\n    and b."""\n'
        'def _hidden():\n    """Nothing to see in here."""\n'
        "def silent():\n    pass\n"
        'class C:\n    """A class with a method."""\n    def g(self):\n        """A method of the class."""\n'
    )
    assert sample.documented("m", source) == [
        sample.Documented("m", "", "What the module is about."),
        sample.Documented("m.f", "(a, *, b=1)", "Do something with a\nand b."),
        sample.Documented("m.C", "", "A class with a method."),
        sample.Documented("m.C.g", "(self)", "A method of the class."),
    ]


def test_rows_are_dealt_round_robin_and_again_the_same(tmp_path):
    rows = [{"id": str(i), "text": "t"} for i in range(5)]
    paths = [tmp_path / "part_0.jsonl", tmp_path / "part_1.jsonl"]
    record = sample.write("docs", rows, paths, tmp_path / "record.json")
    assert [row["id"] for row in read(paths)] == ["0", "2", "4", "1", "3"]
    assert record.counts == {"rows": 5, "bytes": sum(path.stat().st_size for path in paths)}
    again = sample.write("docs", rows, paths, tmp_path / "record.json")
    assert again.outputs == record.outputs


@pytest.mark.parametrize("name", ["code", "tools"])
def test_the_script_writes_all_rows(run_script, tmp_path, rows, name):
    paths = [tmp_path / f"part_{i}.jsonl" for i in range(2)]
    status, stderr = run_script(
        "write_sample", "--name", name, "--files", *paths, "--record", tmp_path / "record.json"
    )
    assert status == 0, stderr
    assert sorted(row["id"] for row in read(paths)) == sorted(row["id"] for row in rows[name])
    assert files.read_json(tmp_path / "record.json")["counts"]["rows"] == len(rows[name])


# ------------------------------------------------------------------------------------ conversations


def test_conversations_are_many_varied_and_short(rows):
    for name, least in (("questions", 2000), ("tools", 2000)):
        chats = rows[name]
        assert len(chats) == least
        lengths = sorted(sum(len(str(m["content"])) for m in chat["messages"]) for chat in chats)
        assert lengths[len(lengths) * 9 // 10] < 900
        assert len({json.dumps(chat["messages"]) for chat in chats}) == len(chats)
        assert any(chat["messages"][0]["role"] == "system" for chat in chats)
        assert any(sum(m["role"] == "user" for m in chat["messages"]) > 1 for chat in chats)
        assert all(chat["messages"][-1]["role"] == "assistant" for chat in chats)


def test_answers_are_the_docstrings(rows):
    docs = {entry.name: entry.doc for entry in sample_chats._entries()}
    assert docs["textwrap.dedent"] == "Remove any common leading whitespace from every line in `text`."
    answers = dict.fromkeys(docs, 0)
    for chat in rows["questions"]:
        name = chat["id"].removeprefix("questions/")
        answers[name] += any(m["content"] == docs[name] for m in chat["messages"])
    assert sum(answers.values()) > 1000


# ------------------------------------------------------------------------------------------ requests


def calls(chat: dict) -> list[tuple[str, dict[str, str]]]:
    """The tools that a conversation calls, with their arguments."""
    found = []
    for message in chat["messages"]:
        for call in message.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            found.append((call["function"]["name"], arguments))
    return found


def test_no_conversation_calls_a_tool_as_another_one_or_the_corpus_does(rows):
    """So a held-out call is a new one: neither tuning nor pretraining has seen its arguments together."""
    pattern = re.compile(r'^{"name": .*}$', re.MULTILINE)
    in_text = [json.loads(call) for row in rows["requests"] for call in pattern.findall(row["text"])]
    seen = {(call["name"], *call["arguments"].values()) for call in in_text}
    assert (len(in_text), len(seen)) == (200 * 3 * 3, 200 * 3)  # in three wordings
    asked = [(name, *arguments.values()) for chat in rows["tools"] for name, arguments in calls(chat)]
    assert len(asked) == 2021
    assert len({*asked, *seen}) == len(asked) + len(seen)


def test_each_argument_stands_in_the_request(rows):
    """All but the name of the tool is copied from what the user says; each tool is asked for as often."""
    tools = collections.Counter()
    for chat in rows["tools"]:
        said = [m["content"] for m in chat["messages"] if m["role"] == "user"]
        for text, (name, arguments) in zip(said, calls(chat), strict=False):
            tools[name] += 1
            assert all(value in text for value in arguments.values()), chat["id"]
    assert set(tools) == {tool["function"]["name"] for tool in sample_requests.TOOLS}
    assert max(tools.values()) < 1.1 * min(tools.values())


def test_each_argument_is_one_token_in_the_request_and_one_in_the_call(rows):
    """With words of several tokens the tuning takes twice the steps to learn to copy them."""
    text = load({}, {}).tokenizer.text
    documents = [
        row["text"]
        for name, count in (("docs", 3), ("requests", 3))
        for part in range(count)
        if f"data/sample/{name}/part_{part}.jsonl" in text
        for row in rows[name][part::count]
    ]
    made = tokenizer.train(documents, load({}, {}).tokenizer.vocab_size)
    choices = {word for each in sample_requests.ARGUMENTS.values() for words in each for word in words}
    for word in (*(word for word in choices if not word.isdigit()), "user", "assistant", "tool"):
        assert len(made.encode(word)) == 1, word
    for word in (word for word in choices if not word.isdigit()):
        assert made.encode(f"go {word}").tokens[-1] == f"\u0120{word}"


def test_tool_calls_have_a_result_and_arguments_of_both_kinds(rows):
    kinds = set()
    for chat in rows["tools"]:
        made = [m for m in chat["messages"] if "tool_calls" in m]
        results = [m for m in chat["messages"] if m["role"] == "tool"]
        for call, result in zip(made, results, strict=True):
            function = call["tool_calls"][0]["function"]
            assert function["name"] == result["name"]
            assert result["tool_call_id"] == call["tool_calls"][0]["id"]
            assert isinstance(json.loads(result["content"]), dict)
            kinds.add(type(function["arguments"]))
    assert kinds == {dict, str}


def test_the_system_message_says_whether_the_assistant_reasons(rows):
    reasoning = 0
    for chat in rows["tools"]:
        asked_for = chat["messages"][0]["content"] == sample_requests.REASON
        made = [m for m in chat["messages"] if "tool_calls" in m]
        assert all(("reasoning_content" in m) == asked_for for m in made)
        reasoning += asked_for
    assert reasoning == 21

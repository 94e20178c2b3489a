"""The sample text and conversations: real, the same each time, and without paths of this machine."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from snaketron import files
from snaketron.data.sample import chats as sample_chats
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
        "questions": list(sample_chats.questions()),
        "tools": list(sample_chats.tools()),
    }


def test_the_corpora_have_the_size_that_the_tiny_run_needs(rows):
    sizes = {name: sum(len(row["text"]) for row in rows[name]) for name in ("docs", "code")}
    assert 1_800_000 < sizes["docs"] < 4_000_000
    assert 7_000_000 < sizes["code"] <= 8_000_000
    assert max(len(row["text"]) for row in rows["code"]) < 200_000


@pytest.mark.parametrize("name", ["docs", "code", "packages", "questions", "tools"])
def test_rows_have_ids_of_their_own_and_no_path_of_this_machine(rows, name):
    ids = [row["id"] for row in rows[name]]
    assert len(set(ids)) == len(ids)
    text = json.dumps(rows[name])
    assert sys.prefix not in text and str(Path(__file__).parents[4]) not in text
    assert "snaketron" not in text


def test_code_is_the_source_in_order(rows):
    pieces = [row["text"] for row in rows["code"] if row["id"].startswith("code/argparse/")]
    assert len(pieces) > 3
    assert "".join(pieces) == Path(sys.modules["argparse"].__file__ or "").read_text()


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


@pytest.mark.parametrize(("name", "option"), [("sample_corpus", "texts"), ("sample_chat", "chats")])
def test_the_scripts_write_all_rows(run_script, tmp_path, rows, name, option):
    source = "code" if name == "sample_corpus" else "tools"
    paths = [tmp_path / f"part_{i}.jsonl" for i in range(2)]
    kind = "--corpus" if name == "sample_corpus" else "--source"
    status, stderr = run_script(
        name, kind, source, f"--{option}", *paths, "--record", tmp_path / "record.json"
    )
    assert status == 0, stderr
    assert sorted(row["id"] for row in read(paths)) == sorted(row["id"] for row in rows[source])
    assert files.read_json(tmp_path / "record.json")["counts"]["rows"] == len(rows[source])


# ------------------------------------------------------------------------------------ conversations


def test_conversations_are_many_varied_and_short(rows):
    for name in ("questions", "tools"):
        chats = rows[name]
        assert 1500 <= len(chats) <= 2500
        lengths = sorted(sum(len(str(m["content"])) for m in chat["messages"]) for chat in chats)
        assert lengths[len(lengths) * 9 // 10] < 900
        assert len({json.dumps(chat["messages"]) for chat in chats}) == len(chats)
        assert any(chat["messages"][0]["role"] == "system" for chat in chats)
        assert any(sum(m["role"] == "user" for m in chat["messages"]) > 1 for chat in chats)
        assert all(chat["messages"][-1]["role"] == "assistant" for chat in chats)


def test_tool_calls_have_a_result_and_arguments_of_both_kinds(rows):
    kinds = set()
    for chat in rows["tools"]:
        (call,) = [m for m in chat["messages"] if "tool_calls" in m]
        (result,) = [m for m in chat["messages"] if m["role"] == "tool"]
        function = call["tool_calls"][0]["function"]
        assert function["name"] == chat["tools"][0]["function"]["name"] == result["name"]
        assert result["tool_call_id"] == call["tool_calls"][0]["id"]
        arguments = function["arguments"]
        kinds.add(type(arguments))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        assert chat["id"] == f"tools/{arguments['name']}"
    assert kinds == {dict, str}
    with_reasoning = sum(any("reasoning_content" in m for m in chat["messages"]) for chat in rows["tools"])
    assert 200 < with_reasoning < 600


def test_answers_are_the_docstrings(rows):
    docs = {entry.name: entry.doc for entry in sample_chats._entries()}
    assert docs["textwrap.dedent"] == "Remove any common leading whitespace from every line in `text`."
    for chat in rows["tools"]:
        (result,) = (json.loads(m["content"]) for m in chat["messages"] if m["role"] == "tool")
        if "doc" in result:
            assert result["doc"] == docs[chat["id"].removeprefix("tools/")]
            assert any(m["role"] == "assistant" and m["content"] == result["doc"] for m in chat["messages"])

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import render_chat
from snaketron import files, lineage
from snaketron.data import packed
from snaketron.data.split import split_of
from snaketron.log import UserError
from tests.unit.data.chat_samples import build_tokenizer, question, save_tokenizer, write_jsonl

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "tokenizer")


def arguments(tmp_path: Path, chats: Path, **options: Any) -> list[str]:
    values = {
        "chats": chats,
        "source": "questions",
        "messages_field": "messages",
        "tools_field": "tools",
        "tokenizer": tmp_path / "tokenizer",
        "template": tmp_path / "tokenizer/chat_template.jinja",
        "valid_fraction": 0.2,
        "test_fraction": 0.1,
        "output": tmp_path / "out/part_0.parquet",
        "record": tmp_path / "out/part_0.json",
    } | options
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def render(tmp_path: Path, rows: list[Any], **options: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    chats = write_jsonl(tmp_path / "chats.jsonl", rows)
    assert render_chat.main(arguments(tmp_path, chats, **options)) == 0
    return pq.read_table(tmp_path / "out/part_0.parquet").to_pylist(), lineage.read(
        tmp_path / "out/part_0.json"
    )


def refused(tmp_path: Path, chats: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        render_chat.main(arguments(tmp_path, chats, **options))
    assert not list((tmp_path / "out").glob("*"))
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_conversation_becomes_ids_mask_row_and_split(tmp_path, tokenizer):
    rows, record = render(tmp_path, [{"messages": question("What is two?", "Two.")}])
    text = "<|im_start|>user\nWhat is two?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
    ids = build_tokenizer().encode(text).ids
    answer = len(build_tokenizer().encode("Two.").ids) + 1  # and <|im_end|>
    mask = [0] * (len(ids) - answer - 1) + [1] * answer + [0]
    assert rows == [{"input_ids": ids, "loss_mask": mask, "row": 1, "split": split_of(text, 0.2, 0.1)}]
    assert record["counts"]["conversations"] == record["counts"]["rows"] == 1
    assert (record["counts"]["tokens"], record["counts"]["trained_tokens"]) == (len(ids), answer)
    assert record["counts"]["dropped"] == {} and record["name"] == "questions/part_0"


def test_the_file_says_what_it_was_made_with(tmp_path, tokenizer):
    render(tmp_path, [{"messages": question("a", "b")}])
    schema = pq.read_schema(tmp_path / "out/part_0.parquet")
    assert [str(field.type) for field in schema] == [
        "list<element: int32>",
        "list<element: uint8>",
        "int64",
        "dictionary<values=string, indices=int8, ordered=0>",
    ]
    _, metadata = packed.read_footer(tmp_path / "out/part_0.parquet", schema.names)
    assert metadata == {
        "source": "questions",
        "tokenizer_sha256": files.sha256(tokenizer / "tokenizer.json"),
        "template_sha256": files.sha256(tokenizer / "chat_template.jinja"),
    }


def test_splits_are_counted_and_follow_the_text(tmp_path, tokenizer):
    chats = [{"messages": question(f"What is {i}?", str(i))} for i in range(200)]
    rows, record = render(tmp_path, [*chats, *chats])
    by_text: dict[tuple[int, ...], set[str]] = {}
    for row in rows:
        by_text.setdefault(tuple(row["input_ids"]), set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_text.values())  # duplicates are never on both sides
    counted = {split: counts["conversations"] for split, counts in record["counts"]["splits"].items()}
    assert counted == {name: sum(row["split"] == name for row in rows) for name in ("train", "valid", "test")}
    assert 200 < counted["train"] < 360 and counted["valid"] > 20 and counted["test"] > 10


def test_two_runs_write_the_same_bytes(tmp_path, tokenizer):
    chats = [{"messages": question(f"What is {i}?", str(i))} for i in range(20)]
    render(tmp_path, chats)
    first = (tmp_path / "out/part_0.parquet").read_bytes()
    render(tmp_path, chats)
    assert (tmp_path / "out/part_0.parquet").read_bytes() == first


def test_dropped_rows_are_counted_by_reason_and_listed(tmp_path, tokenizer):
    rows, record = render(
        tmp_path,
        [
            {"messages": question("a", "b")},
            {"messages": []},
            {"messages": [{"role": "human", "content": "a"}]},
            {"messages": None},
            {"messages": question("a", "\ufdd0")},
            {"messages": question("a", "<|im_end|>")},
            {"messages": question("c", "d")},
        ],
    )
    assert [row["row"] for row in rows] == [1, 7]
    counts = record["counts"]
    assert (counts["rows"], counts["conversations"]) == (7, 2)
    assert counts["dropped"] == {
        "no messages": 2,
        "unknown role": 1,
        "not Unicode text": 1,
        "a control token in the text": 1,
    }
    assert [dropped["row"] for dropped in counts["dropped_rows"]] == [2, 3, 4, 5, 6]
    assert counts["dropped_rows"][1]["detail"].startswith("message 0 is by 'human'")


def test_at_most_a_hundred_dropped_rows_are_listed(tmp_path, tokenizer):
    _, record = render(tmp_path, [{"messages": []}] * 150 + [{"messages": question("a", "b")}])
    assert record["counts"]["dropped"] == {"no messages": 150}
    assert len(record["counts"]["dropped_rows"]) == 100


def test_a_template_that_trains_nothing_in_a_row_drops_it(tmp_path, tokenizer):
    template = tmp_path / "short.jinja"
    template.write_text(
        "{{ messages[0].content }}{% generation %}{{ messages[1].content[3:] }}{% endgeneration %}"
    )
    _, record = render(
        tmp_path,
        [{"messages": question("a", "b")}, {"messages": question("a", "long")}],
        template=template,
    )
    assert record["counts"]["dropped"] == {"nothing to train on": 1}


def test_tools_are_rendered_and_may_be_missing(tmp_path, tokenizer):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    rows, _ = render(
        tmp_path, [{"messages": question("a", "b"), "tools": tools}, {"messages": question("a", "b")}]
    )
    assert len(rows[0]["input_ids"]) > len(rows[1]["input_ids"])


def test_parquet_and_compressed_files_give_the_same_conversations(tmp_path, tokenizer):
    import gzip

    chats = [
        {"messages": question("a", "b"), "tools": '[{"name": "weather"}]'},
        {"messages": question("c", "d")},
    ]
    expected, _ = render(tmp_path, chats)
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "chats.parquet")
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress((tmp_path / "chats.jsonl").read_bytes()))
    for name in ("chats.parquet", "chats.jsonl.gz"):
        assert render_chat.main(arguments(tmp_path, tmp_path / name)) == 0
        assert pq.read_table(tmp_path / "out/part_0.parquet").to_pylist() == expected


def test_an_empty_file_gives_a_file_of_no_rows(tmp_path, tokenizer):
    rows, record = render(tmp_path, [])
    assert rows == [] and record["counts"]["rows"] == 0


def test_a_missing_field_is_an_error_that_names_the_fields(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"conversations": [], "id": 1}])
    message = refused(tmp_path, chats)
    assert message.startswith("chats.jsonl:1: no field 'messages'; the fields are 'conversations', 'id'")


def test_a_field_that_holds_no_messages_is_an_error(tmp_path, tokenizer):
    chats = write_jsonl(
        tmp_path / "chats.jsonl", [{"messages": question("a", "b")}, {"messages": "Hello", "id": 1}]
    )
    message = refused(tmp_path, chats)
    assert message.startswith(
        "chats.jsonl:2: field 'messages' holds a str, not a list of messages; the fields are"
    )


def test_a_file_of_which_no_row_can_be_used_is_an_error(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [{"from": "human", "value": "a"}]}] * 3)
    assert refused(tmp_path, chats) == (
        "chats.jsonl: none of 3 rows can be used: 3 x a message without a role; "
        "row 1: message 0 has from, value"
    )


def test_a_damaged_line_is_an_error(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    chats.write_text(chats.read_text() + '{"messages": [')
    assert refused(tmp_path, chats).startswith("chats.jsonl:2: invalid JSON")


def test_a_template_without_a_generation_block_is_an_error(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    (tmp_path / "none.jinja").write_text("{{ messages[0].content }}")
    assert "generation" in refused(tmp_path, chats, template=tmp_path / "none.jinja")


def test_a_missing_template_or_tokenizer_is_an_error(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    message = refused(tmp_path, chats, template=tmp_path / "none.jinja")
    assert message.startswith("none.jinja: no such chat template")
    message = refused(tmp_path, chats, tokenizer=tmp_path / "none")
    assert message.startswith("none/tokenizer.json: no such file")


def test_the_job_does_not_import_what_is_slow(tmp_path, tokenizer):
    """Each of these takes a second or more, in every one of dozens of jobs."""
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    code = (
        "import sys, render_chat; render_chat.main(sys.argv[1:]); "
        "sys.exit(' '.join({'torch', 'transformers', 'pandas', 'datatrove'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, *arguments(tmp_path, chats)], check=True)

"""Conversations of a shard become token ids with masks."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path

import render_chat
from snaketron import files
from snaketron.data import arrow
from snaketron.data.chats import render as render_module
from snaketron.data.split import split_of
from snaketron.lineage.record import read
from snaketron.log import UserError
from tests.unit.data.chats.chat_samples import build_tokenizer, question, write_jsonl
from tests.unit.data.chats.rendering import (
    arguments,
    render,
    render_files,
    texts,
)
from tests.unit.data.conftest import slow_imports

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def test_a_conversation_becomes_ids_mask_row_and_split(tmp_path, tokenizer):
    rows, record = render(tmp_path, [{"messages": question("What is two?", "Two.")}])
    text = "<|im_start|>user\nWhat is two?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
    ids = build_tokenizer().encode(text).ids
    answer = len(build_tokenizer().encode("Two.").ids) + 1  # and <|im_end|>
    mask = [0] * (len(ids) - answer - 1) + [1] * answer + [0]
    place = {"file": str(tmp_path / "chats.jsonl"), "row": 1, "turn": 0}
    row = {"input_ids": ids, "loss_mask": mask, **place, "reasoning_mode": "none"}
    assert rows == [row | {"split": split_of(text, 0.2, 0.1)}]
    assert record.counts["conversations"] == record.counts["rows"] == record.counts["sequences"] == 1
    assert (record.counts["tokens"], record.counts["trained_tokens"]) == (len(ids), answer)
    assert record.counts["dropped"] == {} and record.name == "questions/part_0"


def test_the_file_says_what_it_was_made_with(tmp_path, tokenizer):
    render(tmp_path, [{"messages": question("a", "b")}])
    schema = pq.read_schema(tmp_path / "out/part_0.parquet")
    assert [str(field.type) for field in schema] == [
        "list<element: int32>",
        "list<element: uint8>",
        "string",
        "int64",
        "int32",
        "dictionary<values=string, indices=int8, ordered=0>",
        "dictionary<values=string, indices=int8, ordered=0>",
    ]
    _, metadata = arrow.read_footer(tmp_path / "out/part_0.parquet", schema.names)
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
    counted = {split: counts["conversations"] for split, counts in record.counts["splits"].items()}
    assert counted == {name: sum(row["split"] == name for row in rows) for name in ("train", "valid", "test")}
    assert 200 < counted["train"] < 360 and counted["valid"] > 20 and counted["test"] > 10


def test_all_conversations_are_of_the_split_of_their_source(tmp_path, tokenizer):
    chats = [{"messages": question(f"What is {i}?", str(i))} for i in range(50)]
    rows, record = render(tmp_path, chats, split="test")
    assert [row["split"] for row in rows] == ["test"] * 50
    counted = {split: counts["conversations"] for split, counts in record.counts["splits"].items()}
    assert counted == {"train": 0, "valid": 0, "test": 50}


def test_two_runs_write_the_same_bytes(tmp_path, tokenizer):
    chats = [{"messages": question(f"What is {i}?", str(i))} for i in range(20)]
    render(tmp_path, chats)
    first = (tmp_path / "out/part_0.parquet").read_bytes()
    render(tmp_path, chats)
    assert (tmp_path / "out/part_0.parquet").read_bytes() == first


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
        found = pq.read_table(tmp_path / "out/part_0.parquet").to_pylist()
        assert found == [row | {"file": str(tmp_path / name)} for row in expected]


def test_an_empty_file_is_refused_as_one_of_text_is(tmp_path, tokenizer):
    """It may be a copy that failed; of files after a limit nothing is known."""
    full, empty = write_jsonl(tmp_path / "a.jsonl", [{"messages": question("a", "b")}]), tmp_path / "b.jsonl"
    empty.write_text(" \n\n")
    rows, _ = render_files(tmp_path, full, empty, max_documents=1)
    assert len(rows) == 1
    for chats in ([full, empty], [empty]):
        with pytest.raises(
            UserError, match=r"b\.jsonl: holds no conversations; remove it from the source 'qu"
        ):
            render_files(tmp_path, *chats)


def test_files_of_a_shard_are_rendered_in_order(tmp_path, tokenizer):
    parts = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": question(name, str(i))} for i in range(2)])
        for name in ("b", "a")
    ]
    rows, counts = render_files(tmp_path, *parts)
    assert [(Path(row["file"]).name, row["row"]) for row in rows] == [
        ("b.jsonl", 1),
        ("b.jsonl", 2),
        ("a.jsonl", 1),
        ("a.jsonl", 2),
    ]
    assert counts["rows"] == counts["conversations"] == 4
    record = read(tmp_path / "out/part_0.json")
    assert [Path(entry.path).name for entry in record.inputs[:2]] == ["b.jsonl", "a.jsonl"]


def test_max_documents_takes_exactly_so_many_conversations(tmp_path, tokenizer, three_files):
    whole, _ = render_files(tmp_path, *three_files, max_dropped_fraction=0.2)
    rows, counts = render_files(tmp_path, *three_files, max_documents=3, max_dropped_fraction=0.3)
    assert rows == whole[:3]
    assert (counts["rows"], counts["conversations"], counts["dropped"]) == (4, 3, {"no messages": 1})
    inputs = read(tmp_path / "out/part_0.json").inputs
    assert str(three_files[1]) in str(inputs) and str(three_files[2]) not in str(inputs)  # never opened


def test_max_tokens_takes_whole_conversations_until_the_next_would_exceed_it(
    tmp_path, tokenizer, three_files
):
    whole, _ = render_files(tmp_path, *three_files, max_dropped_fraction=0.2)
    lengths = [len(row["input_ids"]) for row in whole]
    for most, expected in ((sum(lengths[:3]), 3), (sum(lengths[:4]) - 1, 3), (sum(lengths[:4]), 4)):
        rows, counts = render_files(tmp_path, *three_files, max_tokens=most, max_dropped_fraction=0.3)
        assert rows == whole[:expected]
        assert counts["rows"] == expected + 1 and counts["tokens"] == sum(lengths[:expected]) <= most


def test_metadata_fields_are_kept_as_text(tmp_path, tokenizer, caplog):
    chats = [
        {"messages": question("a", "b"), "id": 7, "tags": ["x"], "license": "mit"},
        {"messages": question("c", "d"), "license": None},
    ]
    rows, record = render(tmp_path, chats, metadata_fields=["id", "tags", "license", "lisence"])
    assert [[row[name] for name in ("id", "tags", "license", "lisence")] for row in rows] == [
        ["7", '["x"]', "mit", None],
        [None, None, None, None],
    ]
    assert record.settings["metadata_fields"] == ["id", "tags", "license", "lisence"]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"{tmp_path}/chats.jsonl: no row has the metadata field 'lisence'"]


def test_row_groups_do_not_change_what_is_written(tmp_path, tokenizer, three_files, monkeypatch):
    whole, _ = render_files(tmp_path, *three_files, max_dropped_fraction=0.2)
    monkeypatch.setattr(render_module, "ROW_GROUP_TOKENS", 30)
    monkeypatch.setattr(render_module, "BATCH_CHARACTERS", 100)
    assert render_files(tmp_path, *three_files, max_dropped_fraction=0.2)[0] == whole
    assert pq.read_metadata(tmp_path / "out/part_0.parquet").num_row_groups > 1


def test_keys_that_nobody_reads_are_counted_and_told(tmp_path, tokenizer, caplog):
    chats = [{"messages": [*question("a", "b"), {"role": "user", "content": "c", "audio": "x"}]}] * 2
    row = {"messages": question("c", "d"), "chat_template_kwargs": {"low_effort": True}, "documents": []}
    _, record = render(tmp_path, [*chats, row])
    assert record.counts["unread_keys"] == {"audio": 2, "chat_template_kwargs of the row": 1}
    assert "nobody reads the key 'audio' of messages, in 2 rows" in caplog.text


def test_keys_that_the_template_does_not_ask_a_message_for_are_told(tmp_path, tokenizer):
    """The template has each of these names: for a part of a text, for a call, for variables of its own."""
    messages = [
        {"role": "user", "text": "How is the weather?", "name": "Bob"},
        {"role": "assistant", "content": "I look.", "tool_call": {"name": "weather"}, "tools": ["weather"]},
    ]
    rows, record = render(tmp_path, [{"messages": messages}])
    assert texts(rows, ()) == ["<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n⟦I look.<|im_end|>⟧\n"]
    assert record.counts["unread_keys"] == {"text": 1, "name": 1, "tool_call": 1, "tools": 1}


@pytest.mark.parametrize(
    "read",
    [
        *("m.name", "m['name']", "m.get('name')", "'name' in m", "m | tojson", "m | string"),
        *(
            "m | items | list",
            "m | list",
            "m.values() | list",
            "dict(m).name",
            "dict(m, x=1) | string",
            "m.copy().name",
            "m | last",
            "[m] | map(attribute='name') | list",
        ),
    ],
)
def test_a_key_that_the_template_asks_for_is_read(tmp_path, tokenizer, read):
    template = tmp_path / "names.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if ("
        + read
        + ") | string %}{% endif %}"
        "<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    messages = [
        {"role": "user", "content": "a", "name": "Bob", "x": 1},
        {"role": "assistant", "content": "b"},
    ]
    _, record = render(tmp_path, [{"messages": messages}], template=template)
    assert "name" not in record.counts.get("unread_keys", {})


@pytest.mark.parametrize("copy", ["m.copy()", "dict(m)", "dict(m, content=m.content | trim)"])
def test_a_key_that_the_template_does_not_ask_a_copy_for_is_told(tmp_path, tokenizer, copy):
    """As a template makes it that changes a message."""
    template = tmp_path / "copies.jinja"
    template.write_text(
        "{% for m in messages %}{% set c = "
        + copy
        + " %}<|im_start|>{{ c.role }}\n{{ c.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    messages = [{"role": "user", "content": "a", "x": 1}, {"role": "assistant", "content": "c"}]
    rows, record = render(tmp_path, [{"messages": messages}], template=template)
    assert texts(rows, ()) == ["<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦c<|im_end|>⟧\n"]
    assert record.counts["unread_keys"] == {"x": 1}


def test_tools_that_the_template_does_not_write_are_counted_and_told(tmp_path, tokenizer, caplog):
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
        "{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    chats = [{"messages": messages, "tools": [{"type": "function", "function": {"name": "weather"}}]}]
    chats.append({"messages": question("a", "b")})
    _, record = render(tmp_path, chats, template=template)
    assert record.counts["tools_left_out"] == 1
    assert "1 conversations have tools that the template does not write" in caplog.text
    assert "tools_left_out" not in render(tmp_path, chats)[1].counts


def test_a_system_text_under_another_name_is_told(tmp_path, tokenizer):
    rows = [{"messages": question("a", "b"), "system_prompt": "Be brief."}]
    assert render(tmp_path, rows)[1].counts["unread_keys"] == {"system_prompt of the row": 1}
    found, record = render(tmp_path, rows, system_field="system_prompt")
    assert texts(found, ())[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert "unread_keys" not in record.counts
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    counts = render_files(tmp_path, tmp_path / "chats.parquet")[1]
    assert counts["unread_keys"] == {"system_prompt of the row": 1}


def test_a_row_that_is_not_to_be_trained_is_told(tmp_path, tokenizer):
    """Only messages have weights here; a row is left out by `where: {train: [true]}`."""
    rows = [{"messages": question("a", "b"), "train": train, "weight": 1.0} for train in (True, False, None)]
    _, record = render(tmp_path, rows)
    assert record.counts["unread_keys"] == {"train of the row": 1}
    kept, record = render(tmp_path, rows, where={"train": [True]})
    assert len(kept) == 1 and "unread_keys" not in record.counts


def test_calls_of_different_shapes_in_parquet_keep_their_own_arguments(tmp_path, tokenizer):
    chats, expected = [], []
    for name, given in (("weather", {"city": "Oslo"}), ("dice", {"sides": 6})):
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": given}}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": {name: given}}}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        chats.append({"messages": [{"role": "user", "content": "a"}, answer], "tools": [tool]})
        expected.append((json.dumps(given), json.dumps(tool)))
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "chats.parquet")
    assert "null" in json.dumps(pq.read_table(tmp_path / "chats.parquet").to_pylist())
    rows, _ = render_files(tmp_path, tmp_path / "chats.parquet")
    for text, (given, tool) in zip(texts(rows, ()), expected, strict=True):
        assert f'"arguments": {given}}}' in text and tool in text and "null" not in text


def test_bytes_and_maps_of_parquet_are_texts_and_objects(tmp_path, tokenizer):
    """Spark writes objects of any keys as maps, and older programs all text as bytes."""
    call = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.binary()))])
    fields = [("role", pa.binary()), ("content", pa.binary()), ("tool_calls", pa.list_(call))]
    calls = [{"name": "weather", "arguments": [("city", b"Oslo"), ("day", None), ("by", b"train")]}]
    messages = [{"role": b"user", "content": b"a"}, {"role": b"assistant", "tool_calls": calls}]
    tools = [[("name", "weather"), ("description", "Tells the weather.")]]
    table = {
        "messages": pa.array([messages], pa.list_(pa.struct(fields))),
        "tools": pa.array([tools], pa.list_(pa.map_(pa.string(), pa.string()))),
        "system": pa.array([b"Be brief."]),
    }
    pq.write_table(pa.table(table), tmp_path / "chats.parquet")
    rows, counts = render_files(tmp_path, tmp_path / "chats.parquet")
    text, given = texts(rows, ())[0], '{"city": "Oslo", "day": null, "by": "train"}'
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and counts["null_arguments"] == 1
    assert '\n{"name": "weather", "description": "Tells the weather."}\n' in text
    assert f'⟦<tool_call>\n{{"name": "weather", "arguments": {given}}}\n</tool_call>' in text


def test_a_map_of_parquet_with_a_key_twice_and_bytes_that_are_no_text_are_told(tmp_path, tokenizer):
    kinds = {"tools": pa.list_(pa.map_(pa.string(), pa.string())), "system": pa.binary()}
    rows = [
        {"tools": [[("name", "weather"), ("name", "clock")]]},
        {"system": b"caf\xe9"},
        {"system": b"Be brief."},
    ]
    table = {name: pa.array([row.get(name) for row in rows], kind) for name, kind in kinds.items()}
    table["messages"] = pa.array([question("a", "b")] * 3)
    pq.write_table(pa.table(table), tmp_path / "chats.parquet")
    options = {"invalid_text": "drop", "max_dropped_fraction": 1}
    found, counts = render_files(tmp_path, tmp_path / "chats.parquet", **options)
    assert [row["row"] for row in found] == [3]
    assert counts["dropped"] == {"a key that stands twice": 1, "invalid text": 1}
    found, _ = render_files(tmp_path, tmp_path / "chats.parquet", **options | {"invalid_text": "replace"})
    assert "<|im_start|>system\ncaf\ufffd<|im_end|>" in texts(found, ())[0]


def test_values_of_parquet_that_json_does_not_have_are_told(tmp_path, tokenizer):
    """A day beside a message harms nobody; in a call only the template could say how it is written."""
    calls = [{"name": "pay", "arguments": {"sum": Decimal("1.10")}}]
    answer = {"role": "assistant", "content": "b", "tool_calls": calls, "on": date(2026, 1, 31)}
    chats = [[{"role": "user", "content": "a"}, given] for given in (answer, answer | {"tool_calls": []})]
    pq.write_table(pa.table({"messages": chats}), tmp_path / "chats.parquet")
    rows, counts = render_files(tmp_path, tmp_path / "chats.parquet", max_dropped_fraction=1)
    assert [row["row"] for row in rows] == [2] and counts["unread_keys"] == {"on": 2}
    assert [row["detail"] for row in counts["dropped_rows"]] == [
        "Object of type Decimal is not JSON serializable"
    ]


def test_null_arguments_of_json_are_trained_and_counted(tmp_path, tokenizer, caplog):
    """They may be meant; only in Parquet and Arrow it is known that they need not be."""
    call = {"name": "weather", "arguments": {"city": "Oslo", "sides": None}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    rows, record = render(tmp_path, [{"messages": messages}])
    assert '"arguments": {"city": "Oslo", "sides": null}' in texts(rows, ())[0]
    assert record.counts["null_arguments"] == 1 and "1 calls have arguments that are null" in caplog.text


def test_large_integers_keep_their_digits(tmp_path, tokenizer):
    call = {"name": "find", "arguments": {"id": 123456789012345678901234567890, "n": 18446744073709551616}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    rows, _ = render(tmp_path, [{"messages": messages}])
    assert '"id": 123456789012345678901234567890, "n": 18446744073709551616}' in texts(rows, ())[0]


def test_rows_of_other_keys_are_read_as_configured(tmp_path, tokenizer):
    chats = write_jsonl(
        tmp_path / "chats.jsonl",
        [
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
                "system": "Be brief.",
                "functions": [{"name": "weather"}],
            }
        ],
    )
    keys = {"messages_field": "conversations", "role_key": "from", "content_key": "value"}
    rows, _ = render_files(tmp_path, chats, **keys, roles={"human": "user", "gpt": "assistant"})
    text = texts(rows, ())[0]
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and '"name": "weather"' in text
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n")
    rows, _ = render_files(
        tmp_path, chats, **keys, roles={"human": "user", "gpt": "assistant"}, system_field=None
    )
    assert "Be brief." not in texts(rows, ())[0]


def test_a_space_before_an_answer_is_one_token_with_its_first_word_and_trained(tmp_path, tokenizer):
    template = tmp_path / "space.jinja"
    template.write_text(
        "{% for m in messages %}{{ 'USER: ' + m.content + ' ' if m.role == 'user' else 'ASSISTANT: ' + "
        "m.content + '<|im_end|>' }}{% endfor %}{{ 'ASSISTANT: ' if add_generation_prompt }}"
    )
    rows, _ = render(tmp_path, [{"messages": question("What is two?", "is four")}], template=template)
    assert texts(rows, ()) == ["USER: What is two? ASSISTANT:⟦ is four<|im_end|>⟧"]


def test_the_job_does_not_import_what_is_slow(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    assert not slow_imports("render_chat", *arguments(tmp_path, chats))

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import render_chat
from snaketron import files
from snaketron.data import arrow
from snaketron.data.chats import render as render_module
from snaketron.data.chats.unusable import THOUGHTS
from snaketron.data.split import split_of
from snaketron.lineage.record import Record, read
from snaketron.log import UserError
from tests.unit.data.chats.chat_samples import build_tokenizer, question, save_tokenizer, write_jsonl

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

OTHER = Path(__file__).parent / "other_template.jinja"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "tokenizer")


def arguments(tmp_path: Path, *chats: Path, **options: Any) -> list[str]:
    """A command line; options that are none of the script's are settings."""
    values = {
        "tokenizer": tmp_path / "tokenizer",
        "template": tmp_path / "tokenizer/chat_template.jinja",
        "output": tmp_path / "out/part_0.parquet",
        "record": tmp_path / "out/part_0.json",
    }
    settings = {
        "source": "questions",
        "messages_field": "messages",
        "tools_field": "tools",
        "valid_fraction": 0.2,
        "test_fraction": 0.1,
    }
    for name, value in options.items():
        (values if name in values else settings)[name] = value
    given = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return ["--chats", *map(str, chats), "--settings", json.dumps(settings), *given]


def render(tmp_path: Path, rows: list[Any], **options: Any) -> tuple[list[dict[str, Any]], Record]:
    chats = write_jsonl(tmp_path / "chats.jsonl", rows)
    assert render_chat.main(arguments(tmp_path, chats, **options)) == 0
    return pq.read_table(tmp_path / "out/part_0.parquet").to_pylist(), read(tmp_path / "out/part_0.json")


def render_files(tmp_path: Path, *chats: Path, **options: Any) -> tuple[list[int], dict[str, Any]]:
    """Render files; returns the rows and the counts."""
    assert render_chat.main(arguments(tmp_path, *chats, **options)) == 0
    rows = pq.read_table(tmp_path / "out/part_0.parquet").to_pylist()
    return rows, read(tmp_path / "out/part_0.json").counts


def refused(tmp_path: Path, *chats: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        render_chat.main(arguments(tmp_path, *chats, **options))
    assert not list((tmp_path / "out").glob("*"))
    return str(caught.value).replace(f"{tmp_path}/", "")


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
        max_dropped_fraction=0.8,
    )
    assert [row["row"] for row in rows] == [1, 7]
    counts = record.counts
    assert (counts["rows"], counts["conversations"]) == (7, 2)
    assert counts["dropped"] == {
        "no messages": 2,
        "unknown role": 1,
        "not Unicode text": 1,
        "a control token in the text": 1,
    }
    assert [dropped["row"] for dropped in counts["dropped_rows"]] == [2, 3, 4, 5, 6]
    assert counts["dropped_rows"][1]["detail"].startswith("message 0 is by 'human'")


def test_a_dropped_row_is_told_in_the_log_of_a_job_and_not_on_the_terminal(tmp_path, tokenizer):
    """blend_sft tells it there, of all shards of the source together."""
    rows = [{"messages": question("a", str(i))} for i in range(200)]
    rows.insert(17, {"messages": [{"role": "usr", "content": "a"}]})
    given = arguments(tmp_path, write_jsonl(tmp_path / "chats.jsonl", rows))
    command = [sys.executable, render_chat.__file__, *given, "--log-file", str(tmp_path / "job.log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    said = (
        f"{tmp_path}/chats.jsonl: dropped 1 of 201 rows (1 x unknown role); the first is "
        f"{tmp_path}/chats.jsonl:18: unknown role: message 0 is by 'usr'"
    )
    log = (tmp_path / "job.log").read_text()
    assert said in log and "(rename it, or name it in `roles` of the source" in log


def test_at_most_a_hundred_dropped_rows_of_a_reason_are_listed(tmp_path, tokenizer):
    chats = [{"messages": []}] * 150 + [{"messages": question("a", "b")}]
    _, record = render(tmp_path, chats, max_dropped_fraction=0.999)
    assert record.counts["dropped"] == {"no messages": 150}
    assert len(record.counts["dropped_rows"]) == 100


def test_a_template_that_trains_nothing_in_a_row_drops_it(tmp_path, tokenizer):
    template = tmp_path / "short.jinja"
    template.write_text(
        "{{ messages[0].content }}: {% set said = messages[1].content if messages[1:] else '' %}"
        "{% if said | length > 3 %}{% generation %}{{ said }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ said }}{% endif %}"
    )
    _, record = render(
        tmp_path,
        [{"messages": question("a", "b")}, {"messages": question("a", "long")}],
        template=template,
        max_dropped_fraction=0.5,
    )
    assert record.counts["dropped"] == {"nothing to train on": 1}


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


def test_an_empty_file_gives_a_file_of_no_rows(tmp_path, tokenizer):
    rows, record = render(tmp_path, [])
    assert rows == [] and record.counts["rows"] == 0


def test_a_missing_field_is_an_error_that_names_the_fields(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"conversations": [], "id": 1}])
    message = refused(tmp_path, chats)
    assert message.startswith("chats.jsonl:1: no field 'messages'; the fields are 'conversations', 'id'")


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


@pytest.fixture
def three_files(tmp_path: Path) -> list[Path]:
    """Six conversations in three files, and a row of the second that cannot be used."""
    chats = [{"messages": question("What is two?", "Two." * (i + 1))} for i in range(6)]
    rows = [chats[:2], [{"messages": []}, *chats[2:4]], chats[4:]]
    return [write_jsonl(tmp_path / f"{i}.jsonl", part) for i, part in enumerate(rows)]


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


def test_a_first_conversation_above_max_tokens_is_an_error(tmp_path, tokenizer, three_files):
    assert refused(tmp_path, *three_files, max_tokens=5) == (
        "0.jsonl:1: the first conversation has 19 tokens, more than max_tokens 5 of source 'questions'; "
        "raise it"
    )


def test_rows_are_filtered_and_counted(tmp_path, tokenizer):
    chats = [{"messages": question("a", str(i)), "used_in": used} for i, used in enumerate("xyx")]
    rows, record = render(tmp_path, chats, where={"used_in": ["x"]})
    assert [row["row"] for row in rows] == [1, 3]
    assert record.counts["dropped"] == {"filtered by where": 1}
    rows, record = render(tmp_path, chats, where={"used_in": ["z"]})
    assert rows == [] and record.counts["dropped"] == {"filtered by where": 3}


def test_bad_rows_are_dropped_and_counted_up_to_a_share(tmp_path, tokenizer):
    chats = [{"messages": question("a", "b")}, {"messages": "Hello"}, {"messages": question("c", "d")}]
    path = write_jsonl(tmp_path / "chats.jsonl", chats)
    path.write_text(path.read_text() + '{"messages": [')
    rows, counts = render_files(tmp_path, path, bad_rows="drop", max_dropped_fraction=0.5)
    assert [row["row"] for row in rows] == [1, 3]
    assert (counts["rows"], counts["dropped"]) == (4, {"bad row": 2})
    (tmp_path / "out/part_0.parquet").unlink()
    (tmp_path / "out/part_0.json").unlink()
    message = refused(tmp_path, path, bad_rows="drop", max_dropped_fraction=0.4)
    assert message.startswith("2 of 4 rows are bad or invalid, more than max_dropped_fraction 0.4 allows; ")


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


def test_a_metadata_field_cannot_take_the_name_of_a_column(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b"), "split": "x"}])
    message = refused(tmp_path, chats, metadata_fields=["split"])
    assert message.startswith("metadata_fields: 'split' is a column of rendered chats itself; leave it out")


def test_row_groups_do_not_change_what_is_written(tmp_path, tokenizer, three_files, monkeypatch):
    whole, _ = render_files(tmp_path, *three_files, max_dropped_fraction=0.2)
    monkeypatch.setattr(render_module, "ROW_GROUP_TOKENS", 30)
    monkeypatch.setattr(render_module, "BATCH_CHARACTERS", 100)
    assert render_files(tmp_path, *three_files, max_dropped_fraction=0.2)[0] == whole
    assert pq.read_metadata(tmp_path / "out/part_0.parquet").num_row_groups > 1


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
        "chats.jsonl:1: message 0 has from, value "
        "(name its keys in role_key and content_key of the source (from, value: ShareGPT))"
    )


def test_a_damaged_line_is_an_error(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    chats.write_text(chats.read_text() + '{"messages": [')
    assert refused(tmp_path, chats).startswith("chats.jsonl:2: invalid JSON")


def test_a_template_that_does_not_show_what_is_generated_is_an_error(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    (tmp_path / "none.jinja").write_text("{{ messages[0].content }}")
    assert "generation" in refused(tmp_path, chats, template=tmp_path / "none.jinja")


def test_a_template_of_another_tokenizer_is_an_error(tmp_path, tokenizer):
    """Its <|stop|> would be several tokens, and no model stops at several."""
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    assert refused(tmp_path, chats, template=OTHER).startswith(
        f"{OTHER}: an answer ends with 'It is 4.<|stop|>', and the tokenizer has no added token for that"
    )


def test_an_answer_that_ends_with_its_text_is_dropped(tmp_path, tokenizer):
    """This template ends an answer with <|im_end|>, but a call with the call: no model would stop there."""
    template = tmp_path / "calls.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}"
        "{% endfor %}{{ '<|im_end|>' if not m.tool_calls }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}
    chats = [{"messages": question("a", "b")}, {"messages": [{"role": "user", "content": "a"}, call]}]
    rows, record = render(tmp_path, chats, template=template, max_dropped_fraction=0.5)
    assert [row["row"] for row in rows] == [1]
    assert record.counts["dropped"] == {"an answer without the token that ends it": 1}


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> Path:
    """One that knows the tokens of the other template."""
    return save_tokenizer(tmp_path / "tokenizer", added=["<|turn|>", "<|stop|>"])


def texts(rows: list[dict[str, Any]], added: tuple[str, ...] = ("<|turn|>", "<|stop|>")) -> list[str]:
    """Sequences as text, what is trained between ⟦ and ⟧."""
    tokens = build_tokenizer(added=added)
    bytes_of = {char: byte for byte, char in bytes_to_unicode().items()}
    found = []
    for row in rows:
        text = b""
        for i, (number, trained) in enumerate(zip(row["input_ids"], row["loss_mask"], strict=True)):
            before = row["loss_mask"][i - 1] if i else 0
            text += "⟦".encode() * (trained > before) + "⟧".encode() * (trained < before)
            text += bytes(bytes_of[char] for char in tokens.id_to_token(number))
        found.append((text + "⟧".encode() * row["loss_mask"][-1]).decode())
    return found


THREE_TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1", "reasoning_content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "3", "reasoning_content": "Third."},
    {"role": "user", "content": "Bye."},
]
START = "<|turn|>system\nBe helpful.<|stop|>\n\n"


def said(who: str, text: str) -> str:
    return f"<|turn|>{who}\n{text}<|stop|>\n\n"


def test_a_turn_is_what_inference_sees_and_only_its_answers_are_trained(tmp_path, other_tokenizer):
    """The history is shortened as when that turn is answered, and nothing follows its answers."""
    options = {"template": OTHER, "sequences": "turn"}
    rows, record = render(tmp_path, [{"messages": THREE_TURNS}, {"messages": question("a", "b")}], **options)
    one = START + said("user", "One?")
    two = one + said("assistant", "<think></think>1") + said("user", "Two?")
    three = two + said("assistant", "<think></think>2") + said("user", "Three?")
    assert [text.rstrip() for text in texts(rows)] == [
        f"{one}<|turn|>assistant\n<think>\n⟦First.\n</think>\n1<|stop|>⟧",
        f"{two}<|turn|>assistant\n<think></think>⟦2<|stop|>⟧",
        f"{three}<|turn|>assistant\n<think>\n⟦Third.\n</think>\n3<|stop|>⟧",
        f"{START}{said('user', 'a')}<|turn|>assistant\n<think></think>⟦b<|stop|>⟧",
    ]
    assert [(row["row"], row["turn"]) for row in rows] == [(1, 1), (1, 2), (1, 3), (2, 0)]
    assert [row["reasoning_mode"] for row in rows] == ["full"] * 3 + ["none"]
    counts = record.counts
    assert (counts["rows"], counts["conversations"], counts["sequences"]) == (2, 2, 4)
    assert counts["reasoning_modes"] == {"none": 1, "full": 3}


def test_a_conversation_in_one_has_the_history_of_its_last_answer(tmp_path, other_tokenizer):
    """What follows the last answer is left out: it would make that answer part of the history."""
    rows, _ = render(tmp_path, [{"messages": THREE_TURNS}], template=OTHER)
    assert [text.rstrip() for text in texts(rows)] == [
        START
        + said("user", "One?")
        + "<|turn|>assistant\n<think></think>⟦1<|stop|>⟧\n\n"
        + said("user", "Two?")
        + "<|turn|>assistant\n<think></think>⟦2<|stop|>⟧\n\n"
        + said("user", "Three?")
        + "<|turn|>assistant\n<think>\n⟦Third.\n</think>\n3<|stop|>⟧"
    ]


def test_turns_of_a_template_with_generation_blocks(tmp_path, tokenizer):
    rows, _ = render(tmp_path, [{"messages": THREE_TURNS[:4]}], sequences="turn")
    first = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(rows, ()) == [
        f"{first}⟦<think>\nFirst.\n</think>\n\n1<|im_end|>⟧\n",
        f"{first}<think>\nFirst.\n</think>\n\n1<|im_end|>\n{second}⟦2<|im_end|>⟧\n",
    ]


def test_turns_of_a_template_that_hides_its_loop_are_an_error(tmp_path, tokenizer):
    template = tmp_path / "macro.jinja"
    template.write_text(
        "{% macro all() %}{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}{{ m.content }}"
        "{% else %}{% generation %}{{ m.reasoning_content }}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% endif %}{% endfor %}{% endmacro %}{{ all() }}"
    )
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": THREE_TURNS}])
    message = refused(tmp_path, chats, template=template, sequences="turn")
    assert message.startswith("macro.jinja: `sequences: turn` needs a template that loops over `messages`")


def test_all_sequences_of_a_conversation_share_a_split(tmp_path, tokenizer):
    """The split is that of the whole conversation, whatever becomes of it."""
    chats = [{"messages": [*question(f"What is {i}?", "x"), *THREE_TURNS]} for i in range(60)]
    whole, _ = render(tmp_path, chats)
    expected = {row["row"]: row["split"] for row in whole}
    assert len(set(expected.values())) == 3
    modes = {"stripped": 0.4, "low_effort": 0.3, "truncated": 0.3, "min_budget": 1}
    for options in ({"sequences": "turn"}, {"sequences": "turn", "reasoning": modes}, {"reasoning": modes}):
        rows, counts = render(tmp_path, chats, seed=1, **options)
        assert {(row["row"], row["split"]) for row in rows} == set(expected.items())
        by_split = counts.counts["splits"]
        assert sum(split["conversations"] for split in by_split.values()) == 60


def test_limits_count_conversations_and_not_turns(tmp_path, tokenizer):
    chats = [{"messages": THREE_TURNS}] * 4
    rows, _ = render(tmp_path, chats, sequences="turn", max_documents=2)
    assert [(row["row"], row["turn"]) for row in rows] == [(r, t) for r in (1, 2) for t in (1, 2, 3)]
    most = sum(len(row["input_ids"]) for row in rows) + 5
    assert render(tmp_path, chats, sequences="turn", max_tokens=most)[0] == rows


def test_a_template_without_reasoning_trains_the_answers_and_says_so(tmp_path, tokenizer, caplog):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}")
    only = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "reasoning_content": "b"}]
    rows, record = render(
        tmp_path,
        [{"messages": THREE_TURNS}, {"messages": only}],
        template=template,
        max_dropped_fraction=0.5,
    )
    assert [row["reasoning_mode"] for row in rows] == ["none"]
    assert record.counts["reasoning_not_written"] == 1
    assert record.counts["dropped"] == {"the template leaves out a message": 1}
    assert "writes no reasoning; 1 conversations are trained without theirs" in caplog.text


THINKS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>\nFirst.\n</think>\n\n1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "<think>\nSecond.\n</think>\n\n2"},
]


def test_thinking_in_the_content_is_reasoning_counted_and_split_by_turn(tmp_path, tokenizer, caplog):
    first = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    rows, record = render(tmp_path, [{"messages": THINKS}], sequences="turn")
    assert texts(rows, ())[0] == f"{first}⟦<think>\nFirst.\n</think>\n\n1<|im_end|>⟧\n"
    assert [(row["turn"], row["reasoning_mode"]) for row in rows] == [(1, "full"), (2, "full")]
    assert record.counts["thinking_in_content"] == 2
    assert "2 answers have their thinking in the content; it is taken for reasoning" in caplog.text
    rows, record = render(tmp_path, [{"messages": THINKS}], thinking_tags=None)
    assert [row["reasoning_mode"] for row in rows] == ["none"] and "<think>" in texts(rows, ())[0]
    assert "thinking_in_content" not in record.counts


def test_reasoning_that_the_template_leaves_out_of_the_history_is_counted(tmp_path, other_tokenizer, caplog):
    rows, record = render(tmp_path, [{"messages": THINKS}], template=OTHER)
    assert "First." not in texts(rows)[0] and "Second." in texts(rows)[0]
    assert record.counts["reasoning_left_out"] == 1
    assert (
        "1 answers are trained without their reasoning" in caplog.text and "`sequences: turn`" in caplog.text
    )
    caplog.clear()
    _, record = render(tmp_path, [{"messages": THINKS}], template=OTHER, sequences="turn")
    assert "reasoning_left_out" not in record.counts and "without their reasoning" not in caplog.text


def test_an_answer_of_weight_0_is_not_trained_and_counted(tmp_path, tokenizer, caplog):
    bad = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bad.", "weight": 0}]
    rows, record = render(tmp_path, [{"messages": [*bad, *question("Again", "Good."), *bad]}])
    assert texts(rows, ()) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nBad.<|im_end|>\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n⟦Good.<|im_end|>⟧\n"
    ]
    assert record.counts["untrained_answers"] == 2
    assert "2 answers have the weight 0 and are not trained" in caplog.text


def test_turns_without_a_trained_answer_are_no_sequences(tmp_path, tokenizer):
    messages = [message | ({"weight": 0} if i == 1 else {}) for i, message in enumerate(THREE_TURNS)]
    rows, _ = render(tmp_path, [{"messages": messages}], sequences="turn")
    assert [row["turn"] for row in rows] == [2, 3]
    assert [text.count("⟦") for text in texts(rows, ())] == [1, 1]


def test_keys_that_nobody_reads_are_counted_and_told(tmp_path, tokenizer, caplog):
    chats = [{"messages": [*question("a", "b"), {"role": "user", "content": "c", "audio": "x"}]}] * 2
    row = {"messages": question("c", "d"), "chat_template_kwargs": {"low_effort": True}, "documents": []}
    _, record = render(tmp_path, [*chats, row])
    assert record.counts["unread_keys"] == {"audio": 2, "chat_template_kwargs of the row": 1}
    assert "nobody reads the key 'audio' of messages, in 2 rows" in caplog.text


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


def test_lone_surrogates_in_arguments_obey_invalid_text(tmp_path, tokenizer):
    call = {"name": "f", "arguments": '{"x": "a\\ud800b"}'}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    chats = [{"messages": messages}, {"messages": question("a", "b")}]
    path = write_jsonl(tmp_path / "chats.jsonl", chats)
    assert refused(tmp_path, path) == (
        "chats.jsonl:1: a lone surrogate in a text that is JSON; correct the text, or set invalid_text to "
        "replace or drop"
    )
    rows, counts = render_files(tmp_path, path, invalid_text="replace")
    assert '{"x": "a\ufffdb"}' in texts(rows, ())[0] and counts["replaced"] == 1
    _, counts = render_files(tmp_path, path, invalid_text="drop", max_dropped_fraction=0.5)
    assert counts["dropped"] == {"invalid text": 1}


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


def test_every_special_token_counts_as_a_control_token(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", added=["</s>", "[/INST]"])
    chats = [{"messages": question("a", text)} for text in ("<s>b", "</s>", "x [/INST]", "<think> b")]
    _, record = render(tmp_path, chats, max_dropped_fraction=0.8)
    assert record.counts["dropped"] == {"a control token in the text": 2, THOUGHTS: 1}
    _, record = render(tmp_path, chats, max_dropped_fraction=0.8, thinking_tags=None)
    assert record.counts["dropped"] == {"a control token in the text": 2}


MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% else %}"
    "<|im_start|>assistant\n{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endif %}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


def test_an_end_outside_of_the_generation_block_is_an_error(tmp_path, tokenizer):
    """The model would never learn to stop."""
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    template = tmp_path / "end.jinja"
    template.write_text(MARKED)
    assert refused(tmp_path, chats, template=template).startswith(
        "end.jinja: the generation block of an answer ends with 'It is 4.', and '<|im_end|>' after it is not "
        "trained"
    )
    template.write_text(MARKED.replace("{% endgeneration %}<|im_end|>", "<|im_end|>{% endgeneration %}"))
    rows, _ = render_files(tmp_path, chats, template=template)
    assert texts(rows, ())[0].endswith("assistant\n⟦b<|im_end|>⟧")


def test_a_space_before_an_answer_is_one_token_with_its_first_word_and_trained(tmp_path, tokenizer):
    template = tmp_path / "space.jinja"
    template.write_text(
        "{% for m in messages %}{{ 'USER: ' + m.content + ' ' if m.role == 'user' else 'ASSISTANT: ' + "
        "m.content + '<|im_end|>' }}{% endfor %}{{ 'ASSISTANT: ' if add_generation_prompt }}"
    )
    rows, _ = render(tmp_path, [{"messages": question("What is two?", "is four")}], template=template)
    assert texts(rows, ()) == ["USER: What is two? ASSISTANT:⟦ is four<|im_end|>⟧"]


def test_too_many_dropped_rows_are_an_error_with_an_example_of_each_kind(tmp_path, tokenizer):
    chats = [{"messages": question("a", "b")}] * 98
    chats += [{"messages": [{"role": "human", "content": "a"}]}]
    path = write_jsonl(tmp_path / "chats.jsonl", [*chats, {"messages": question("c", "d")}])
    assert render_files(tmp_path, path)[1]["dropped"] == {"unknown role": 1}  # 1 of 100
    (tmp_path / "out/part_0.parquet").unlink()
    (tmp_path / "out/part_0.json").unlink()
    path = write_jsonl(tmp_path / "chats.jsonl", [*chats, {"messages": []}])
    assert refused(tmp_path, path) == (
        "2 of 100 rows are bad or invalid, more than max_dropped_fraction 0.01 allows; the first is "
        "chats.jsonl:99: unknown role: message 0 is by 'human'; known: system, developer, user, assistant, "
        "tool (rename it, or name it in `roles` of the source: {human: user, gpt: assistant}); another: "
        "chats.jsonl:100: no messages (remove the row, or name the field that "
        "holds them in messages_field); correct the files, or raise max_dropped_fraction"
    )


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

"""Rows and templates that cannot be used: dropped and counted, or an error."""

from __future__ import annotations

import subprocess
import sys

import render_chat
from snaketron.data.chats.unusable import THOUGHTS
from tests.unit.data.chats.chat_samples import question, save_tokenizer, write_jsonl
from tests.unit.data.chats.rendering import (
    OTHER,
    arguments,
    refused,
    render,
    render_files,
    texts,
)


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


def test_a_missing_field_is_an_error_that_names_the_fields(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"conversations": [], "id": 1}])
    message = refused(tmp_path, chats)
    assert message.startswith(
        "chats.jsonl:1: no field 'messages'; the fields are 'conversations', 'id'; name one of them in the "
        "configuration (text_field, messages_field or where); or set sft_data.bad_rows to drop"
    )


def test_a_first_conversation_above_max_tokens_is_an_error(tmp_path, tokenizer, three_files):
    assert refused(tmp_path, *three_files, max_tokens=5) == (
        "0.jsonl:1: the first conversation has 19 tokens, more than max_tokens 5 of source 'questions'; "
        "raise it"
    )


def test_rows_are_filtered_and_counted(tmp_path, tokenizer, caplog):
    chats = [{"messages": question("a", str(i)), "used_in": used} for i, used in enumerate("xyx")]
    rows, record = render(tmp_path, chats, where={"used_in": ["x"]})
    assert [row["row"] for row in rows] == [1, 3]
    assert record.counts["dropped"] == {"filtered by where": 1}
    rows, record = render(tmp_path, chats, where={"used_in": ["z"]})
    assert rows == [] and record.counts["dropped"] == {"filtered by where": 3}
    assert "3 x filtered by where; filtered by where: used_in is 'x'" in caplog.text


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
    assert message.startswith(
        "2 of 4 rows are bad or invalid, more than sft_data.max_dropped_fraction 0.4 allows; "
    )


def test_a_metadata_field_cannot_take_the_name_of_a_column(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b"), "split": "x"}])
    message = refused(tmp_path, chats, metadata_fields=["split"])
    assert message.startswith("metadata_fields: 'split' is a column of rendered chats itself; leave it out")


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
        "chats.jsonl:1: a message without a role: message 0 has from, value "
        "(name its keys in role_key and content_key of the source (from, value: ShareGPT))"
    )


def test_a_file_of_which_no_row_can_be_used_is_told_where_that_is_allowed(tmp_path, tokenizer, caplog):
    """Four of five are not asked for, and the fifth is within the limit; it ended the run."""
    rows = [{"messages": [{"from": "human", "value": "a"}], "used_in": name} for name in "abbbb"]
    found, record = render(tmp_path, rows, where={"used_in": ["a"]}, max_dropped_fraction=0.2)
    assert found == []
    assert record.counts["dropped"] == {"filtered by where": 4, "a message without a role": 1}
    assert "chats.jsonl: none of 5 rows can be used: 4 x filtered by where, 1 x a message" in caplog.text


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


def test_lone_surrogates_in_arguments_obey_invalid_text(tmp_path, tokenizer):
    call = {"name": "f", "arguments": '{"x": "a\\ud800b"}'}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    chats = [{"messages": messages}, {"messages": question("a", "b")}]
    path = write_jsonl(tmp_path / "chats.jsonl", chats)
    assert refused(tmp_path, path) == (
        "chats.jsonl:1: a lone surrogate in a text that is JSON; correct the text; or set "
        "sft_data.invalid_text to replace or drop"
    )
    rows, counts = render_files(tmp_path, path, invalid_text="replace")
    assert '{"x": "a\ufffdb"}' in texts(rows, ())[0] and counts["replaced"] == 1
    _, counts = render_files(tmp_path, path, invalid_text="drop", max_dropped_fraction=0.5)
    assert counts["dropped"] == {"invalid text": 1}


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


def test_too_many_dropped_rows_are_an_error_with_an_example_of_each_kind(tmp_path, tokenizer):
    chats = [{"messages": question("a", "b")}] * 98
    chats += [{"messages": [{"role": "human", "content": "a"}]}]
    path = write_jsonl(tmp_path / "chats.jsonl", [*chats, {"messages": question("c", "d")}])
    assert render_files(tmp_path, path)[1]["dropped"] == {"unknown role": 1}  # 1 of 100
    (tmp_path / "out/part_0.parquet").unlink()
    (tmp_path / "out/part_0.json").unlink()
    path = write_jsonl(tmp_path / "chats.jsonl", [*chats, {"messages": []}])
    assert refused(tmp_path, path) == (
        "2 of 100 rows are bad or invalid, more than sft_data.max_dropped_fraction 0.01 allows; the first is "
        "chats.jsonl:99: unknown role: message 0 is by 'human'; known: system, developer, user, assistant, "
        "tool (rename it, or name it in `roles` of the source: {human: user, gpt: assistant}); another: "
        "chats.jsonl:100: no messages (remove the row, or name the field that "
        "holds them in messages_field); correct the files, or raise sft_data.max_dropped_fraction"
    )


def test_a_missing_template_or_tokenizer_is_an_error(tmp_path, tokenizer):
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": question("a", "b")}])
    message = refused(tmp_path, chats, template=tmp_path / "none.jinja")
    assert message.startswith("none.jinja: no such chat template")
    message = refused(tmp_path, chats, tokenizer=tmp_path / "none")
    assert message.startswith("none/tokenizer.json: no such file")

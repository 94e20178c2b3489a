"""Rendering of conversations by the script, and what it has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import render_chat
from snaketron.lineage.record import Record, read
from snaketron.log import UserError
from tests.unit.data.chats.chat_samples import build_tokenizer, write_jsonl

import pyarrow.parquet as pq
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

OTHER = Path(__file__).parent / "other_template.jinja"


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

"""Tokenizers as rules leave them, and files of conversations."""

from __future__ import annotations

from pathlib import Path

from tests.unit.data.chats.chat_samples import question, save_tokenizer, write_jsonl

import pytest


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def three_files(tmp_path: Path) -> list[Path]:
    """Six conversations in three files, and a row of the second that cannot be used."""
    chats = [{"messages": question("What is two?", "Two." * (i + 1))} for i in range(6)]
    rows = [chats[:2], [{"messages": []}, *chats[2:4]], chats[4:]]
    return [write_jsonl(tmp_path / f"{i}.jsonl", part) for i, part in enumerate(rows)]


@pytest.fixture
def other_tokenizer(tmp_path: Path) -> Path:
    """One that knows the tokens of the other template."""
    return save_tokenizer(tmp_path / "tokenizer", added=["<|turn|>", "<|stop|>"])

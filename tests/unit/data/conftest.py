"""Helpers of the tests of the data stages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from snaketron.data import tokenizer
from snaketron.settings.tokenizer import TokenizerSettings

import pytest

WORDS = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "a b c 1 2 3",
]


def slow_imports(script: str, *arguments: Any) -> set[str]:
    """The slow modules that a script imports: each takes up to seconds, in every one of dozens of jobs."""
    slow = {"torch", "transformers", "pandas", "datatrove"}
    code = f"import sys, {script}; {script}.main(sys.argv[1:]); print('slow:', *{slow} & set(sys.modules))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return set(said.rpartition("slow:")[2].split())


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    text = directory / "text.jsonl"
    _write_jsonl(text, [{"text": words} for words in WORDS * 3])
    tokenizer.build(
        [text],
        settings=TokenizerSettings(vocab_size=300, text_field="text"),
        output=directory / "tokenizer.json",
        record=directory / "record.json",
    )
    return directory


def _write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def write_jsonl() -> Callable[[Path, Iterable[Any]], Path]:
    """Write rows as JSON lines; returns the path."""
    return _write_jsonl


@pytest.fixture
def tokenize(
    tmp_path: Path, tokenizer_dir: Path, run_script: Callable[..., tuple[int, str]]
) -> Callable[..., tuple[int, str, Path]]:
    """Run tokenize_shard on raw files; returns exit status, standard error and the path of the record."""

    def run(
        *text: Path,
        corpus: str = "docs",
        text_field: str = "text",
        valid: float = 0.2,
        test: float = 0.2,
        tokenizer: Path = tokenizer_dir,
        threads: int = 1,
        **settings: Any,
    ) -> tuple[int, str, Path]:
        root = tmp_path / "tokens" / corpus
        shard = text[0].name.partition(".")[0]
        record = root / f"{shard}.json"
        settings |= {"corpus": corpus, "text_field": text_field}
        settings |= {"valid_fraction": valid, "test_fraction": test}
        status, stderr = run_script(
            "tokenize_shard",
            *("--text", *text, "--settings", json.dumps(settings), "--tokenizer", tokenizer),
            *("--bins", *(root / split / f"{shard}.bin" for split in ("train", "valid", "test"))),
            *("--documents", root / f"{shard}.parquet", "--record", record, "--threads", threads),
        )
        return status, stderr, record

    return run

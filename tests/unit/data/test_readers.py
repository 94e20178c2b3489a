"""Raw files: every format gives the same documents, and whatever is wrong with a file names its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from snaketron.data.rows import read_rows, read_texts

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

TEXTS = ["first", "zwei — 二", "line\nbreaks\u2028stay", "", "  ", "x" * 100_000]
LINES = [json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(TEXTS)]
JSONL = b"".join(LINES)


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path, row_group_size=2)
    return path


def texts(path: Path, field: str = "text") -> list[str]:
    return [text for _, text in read_texts(path, field)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", JSONL),
        ("a.json", JSONL),
        ("a.v2.jsonl", JSONL.removesuffix(b"\n")),
        ("crlf.jsonl", JSONL.replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(JSONL)),
        ("two.jsonl.gz", gzip.compress(JSONL[:50]) + gzip.compress(JSONL[50:])),
        ("a.jsonl.zst", zstd(JSONL)),
        ("two.jsonl.zst", zstd(JSONL[:50]) + b"\x50\x2a\x4d\x18\x02\0\0\0hi" + zstd(JSONL[50:])),
    ],
)
def test_json_lines_in_every_wrapping_give_the_same_texts(tmp_path: Path, name: str, data: bytes):
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / name) == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_gives_the_same_texts(tmp_path: Path, kind: pa.DataType):
    table = pa.table({"text": pa.array(TEXTS).cast(kind), "text.length": [len(text) for text in TEXTS]})
    assert texts(parquet(tmp_path / "a.parquet", table)) == TEXTS


def test_a_large_window_is_read(tmp_path: Path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    path = tmp_path / "long.jsonl.zst"
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size
    path.write_bytes(compressor.compress(JSONL) + compressor.flush())
    assert texts(path) == TEXTS


def test_rows_have_what_is_required_and_what_is_there_of_the_optional(tmp_path: Path):
    table = pa.table({"messages": ["m"], "tools": ["t"], "extra": [1]})
    path = parquet(tmp_path / "a.parquet", table)
    assert list(read_rows(path, required=["messages"], optional=["tools", "absent"])) == [
        (1, {"messages": "m", "tools": "t"})
    ]


def test_a_blank_line_is_not_a_row_but_counts_as_a_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n \r\n{"text": "b"}\n\n')
    assert list(read_texts(path, "text")) == [(2, "a"), (4, "b")]


GOOD = b'{"text": "good"}\n'
UTF8_COLUMN = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xff")]
)


@pytest.mark.parametrize(
    ("name", "data", "messages"),
    [
        ("a.jsonl", None, ["a.jsonl: no such file"]),
        ("a.jsonl", b"", ["a.jsonl: holds no documents"]),
        ("a.jsonl", b"\n \n", ["a.jsonl: holds no documents"]),
        ("a.jsonl", b'{"text": ""}\n{"text": ""}\n', ["the text of each of its 2 documents is empty"]),
        ("a.jsonl.gz", gzip.compress(b""), ["holds no documents"]),
        ("a.jsonl.zst", b"", ["holds no documents"]),
        ("a.csv", b"text\nhello\n", ["a.csv: unknown format", ".parquet"]),
        ("a.jsonl", GOOD + b'{"text": "cut\n' + GOOD, ["a.jsonl:2: invalid JSON"]),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', ["a.jsonl:2: invalid JSON"]),
        ("a.jsonl", GOOD + GOOD + b'["text"]\n', ["a.jsonl:3: a JSON list, not an object"]),
        ("a.jsonl", GOOD + b'{"id": 1, "body": "b"}\n', ["a.jsonl:2: no field 'text'", "'id', 'body'"]),
        ("a.jsonl", GOOD + b"{}\n", ["a.jsonl:2: no field 'text'", "none"]),
        ("a.jsonl", GOOD + b'{"text": null}\n', ["a.jsonl:2: field 'text' is null"]),
        ("a.jsonl", GOOD + b'{"text": ["a"]}\n', ["a.jsonl:2: field 'text' is list"]),
        ("a.jsonl", GOOD + b'{"text": "\xe9t\xe9"}\n', ["a.jsonl:2: invalid UTF-8", "0xe9 at position 11"]),
        ("a.jsonl.gz", gzip.compress(GOOD * 5)[:-9], ["a.jsonl.gz:", "cut off or damaged"]),
        ("a.jsonl.gz", GOOD, ["a.jsonl.gz:1: cut off or damaged"]),
        ("a.jsonl.gz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20, ["a.jsonl.gz:1: cut off or damaged"]),
        ("a.jsonl.zst", zstd(GOOD * 5)[:-3], ["a.jsonl.zst:", "cut off or damaged"]),
        ("a.jsonl.zst", zstd(GOOD) + zstd(GOOD)[:-3], ["a.jsonl.zst:2: cut off or damaged"]),
        ("a.jsonl.zst", GOOD, ["a.jsonl.zst:1: cut off or damaged"]),
        ("a.parquet", b"", ["a.parquet: not a complete Parquet file"]),
        ("a.parquet", b"PAR1" + bytes(50), ["a.parquet: not a complete Parquet file"]),
        ("a.parquet", pa.table({"text": pa.array([], pa.string())}), ["a.parquet: holds no documents"]),
        ("a.parquet", pa.table({"body": ["b"], "id": [1]}), ["a.parquet: no field 'text'", "'body', 'id'"]),
        ("a.parquet", pa.table({"text": ["a", None]}), ["a.parquet: row 2: field 'text' is null"]),
        ("a.parquet", pa.table({"text": [1, 2]}), ["a.parquet: row 1: field 'text' is int"]),
        ("a.parquet", pa.table({"text": [b"a"]}), ["a.parquet: row 1: field 'text' is bytes"]),
        ("a.parquet", pa.table({"text": UTF8_COLUMN}), ["a.parquet: row 2: invalid UTF-8"]),
    ],
)
def test_a_bad_file_is_named_and_leaves_no_output(tokenize, tmp_path: Path, name, data, messages):
    path = tmp_path / name
    if isinstance(data, pa.Table):
        parquet(path, data)
    elif data is not None:
        path.write_bytes(data)
    status, stderr, record = tokenize(path)
    assert status == 1
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    for message in messages:
        assert message in stderr
    assert [file for file in record.parent.rglob("*") if file.is_file()] == []


def test_a_parquet_file_with_a_damaged_page_is_named(tokenize, tmp_path: Path):
    path = parquet(tmp_path / "a.parquet", pa.table({"text": [f"document {i} " * 50 for i in range(200)]}))
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 500] = b"\xff" * 500
    path.write_bytes(data)
    status, stderr, _record = tokenize(path)
    assert status == 1
    assert "a.parquet: damaged after row" in stderr

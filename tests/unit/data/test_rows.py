"""Raw files: every format gives the same documents, and whatever is wrong with a file names its place."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from datetime import date
from decimal import Decimal
from pathlib import Path

from snaketron.data.drops import Drops
from snaketron.data.rows import read_documents, read_rows, read_texts
from snaketron.log import UserError
from snaketron.settings.text import ReadSettings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

TEXTS = ["first", "zwei — 二", "line\nbreaks\u2028stay", "", "  ", "x" * 100_000]
LINES = [json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(TEXTS)]
JSONL = b"".join(LINES)
MARK = b"\xef\xbb\xbf"  # of UTF-8
WITHOUT_MARK = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path, row_group_size=2)
    return path


def arrow(batches: list[list[str | None]], *, file: bool = False) -> bytes:
    """An Arrow stream, or file, of a column `id` and a column `text`."""
    sink = io.BytesIO()
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(pa.record_batch([pa.array([0] * len(batch)), pa.array(batch)], schema=schema))
    return sink.getvalue()


def texts(path: Path, field: str = "text") -> list[str]:
    return [text for _, text in read_texts(path, field)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", JSONL),
        ("a.json", JSONL),
        ("a.v2.jsonl", JSONL.removesuffix(b"\n")),
        ("crlf.jsonl", JSONL.replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)),
        ("two.jsonl.gz", gzip.compress(JSONL[:50], mtime=0) + gzip.compress(JSONL[50:], mtime=0)),
        ("a.jsonl.zst", zstd(JSONL)),
        ("two.JSONL.BZ2", bz2.compress(JSONL[:50]) + bz2.compress(JSONL[50:])),
        ("two.ndjson.xz", lzma.compress(JSONL[:50]) + bytes(8) + lzma.compress(JSONL[50:]) + bytes(4)),
        ("mark.jsonl", MARK + JSONL + MARK + b"\n"),
        ("marks.jsonl", b"".join(MARK + line for line in LINES)),
        ("file.arrow", arrow([TEXTS[:2], [], TEXTS[2:]], file=True)),
        ("stream.arrow", arrow([TEXTS[:2], [], TEXTS[2:]])),
        ("two.jsonl.zst", zstd(JSONL[:50]) + b"\x50\x2a\x4d\x18\x02\0\0\0hi" + zstd(JSONL[50:])),
    ],
)
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str, data: bytes):
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / name) == TEXTS


KINDS = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]


@pytest.mark.parametrize("kind", [*KINDS, *(pa.dictionary(pa.int32(), kind) for kind in KINDS[::2])])
def test_parquet_gives_the_same_texts(tmp_path: Path, kind: pa.DataType):
    table = pa.table({"text": pa.array(TEXTS).cast(kind), "text.length": [len(text) for text in TEXTS]})
    assert texts(parquet(tmp_path / "a.parquet", table)) == TEXTS


def test_a_byte_order_mark_inside_a_text_is_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(MARK + b'{"text": "' + MARK + b'"}\n')
    assert texts(tmp_path / "a.jsonl") == ["\ufeff"]


def test_a_row_after_a_mark_is_as_long_as_it_may_be(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(MARK + GOOD.replace(b"\n", b"\r\n") + GOOD)
    settings = ReadSettings(max_line_bytes=len(GOOD) - 1)
    assert len(list(read_rows(tmp_path / "a.jsonl", required=["text"], settings=settings))) == 2


NESTED = [
    {"doc": {"text": "a", "lang": "en", "by": {"name": "x"}}, "doc.id": 1},
    {"doc": {"text": "b", "lang": "de", "by": None}, "doc.id": 2},
    {"doc": {"text": "c", "lang": "en", "by": {"name": "y"}}, "doc.id": 3},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
def test_a_field_of_an_object_is_named_with_a_point(tmp_path: Path, name: str):
    path, table = tmp_path / name, pa.Table.from_pylist(NESTED)
    if name == "a.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in NESTED))
    elif name == "a.parquet":
        parquet(path, table)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    assert texts(path, "doc.text") == ["a", "b", "c"]
    settings = ReadSettings(where={"doc.lang": ["en"]})
    rows = read_documents(path, "doc.text", optional=["doc.by.name", "doc.id", "doc.no"], settings=settings)
    assert [(text, row["doc.by.name"], row["doc.id"], "doc.no" in row) for _, text, row in rows] == [
        ("a", "x", 1, False),
        ("c", "y", 3, False),
    ]
    with pytest.raises(UserError, match=r"no field 'doc\.none'; the fields are 'doc', 'doc\.id'"):
        texts(path, "doc.none")


def test_two_fields_of_one_name_in_a_struct_are_refused(tmp_path: Path):
    both = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    path = parquet(tmp_path / "a.parquet", pa.table({"doc": both}))
    with pytest.raises(UserError, match=r"several columns are called 'doc\.text'; leave one of them"):
        texts(path, "doc.text")


def test_messages_of_bytes_are_text(tmp_path: Path):
    kind = pa.list_(pa.struct([("role", pa.binary()), ("content", pa.binary())]))
    message = {"role": b"user", "content": "wörld".encode()}
    table = pa.table({"messages": pa.array([[message], [{"role": b"user", "content": b"\xff"}]], kind)})
    path = parquet(tmp_path / "a.parquet", table)
    rows = read_rows(path, required=["messages"], settings=ReadSettings(invalid_text="replace"))
    assert [row["messages"][0]["content"] for _, row in rows] == ["wörld", "\ufffd"]


def test_a_stream_after_much_padding_is_read(tmp_path: Path):
    """xz allows any number of zeros between its streams, four at a time."""
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(LINES[0]) + bytes(100_000) + lzma.compress(LINES[1]) + bytes(100_000))
    assert texts(path) == TEXTS[:2]


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
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
UTF8_COLUMN = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\x01\0\0\0\x02\0\0\0"), pa.py_buffer(b"a\xff")]
)


@pytest.mark.parametrize(
    ("name", "data", "messages"),
    [
        ("a.jsonl", None, ["a.jsonl: no such file"]),
        ("a.jsonl", b"", ["a.jsonl: holds no documents"]),
        ("a.jsonl", b"\n \n", ["a.jsonl: holds no documents"]),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), ["holds no documents"]),
        ("a.jsonl.zst", b"", ["holds no documents"]),
        ("a.csv", b"text\nhello\n", ["a.csv: unknown format", ".parquet"]),
        ("a.jsonl", GOOD + b'{"text": "cut\n' + GOOD, ["a.jsonl:2: invalid JSON"]),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', ["a.jsonl:2: a lone surrogate"]),
        ("a.jsonl", GOOD + b'{"text": "\0"}\n', ["a.jsonl:2: invalid JSON"]),
        ("a.jsonl", GOOD + b'{"id": NaN}\n', ["a.jsonl:2: invalid JSON (NaN, column 8, is no JSON number)"]),
        (
            "a.jsonl",
            b'{"id": -Infinity}\n',
            ["a.jsonl:1: invalid JSON (-Infinity, column 8, is no "],
        ),
        (
            "a.json",
            b'[\n  {"text": "a"}\n]\n',
            ["a.json: is one JSON document over several", "jq -c '.[]'"],
        ),
        ("a.json", b'{"rows": [\n"a"]}\n', ["a.json: is one JSON document over several", "jq -c ."]),
        ("a.jsonl", GOOD.decode().encode("utf-16"), ["a.jsonl: is UTF-16 or UTF-32; convert it to UTF-8"]),
        *(("a.jsonl", GOOD.decode().encode(name), ["a.jsonl: is UTF-16 or UTF-32"]) for name in WITHOUT_MARK),
        (
            "a.jsonl",
            gzip.compress(GOOD, mtime=0),
            ["a.jsonl: holds what a file in .gz does; add .gz to its name"],
        ),
        ("a.json.gz", zstd(GOOD), ["a.json.gz: holds what a file in .zst does; add .zst to its name"]),
        ("a.jsonl", pa.table({"text": ["a"]}), ["a.jsonl: holds what a file in .parquet does"]),
        ("a.jsonl", POINTER, ["a.jsonl: is a pointer of Git LFS and not the data; fetch the file with `git"]),
        ("a.parquet", POINTER, ["a.parquet: is a pointer of Git LFS and not the data"]),
        ("a.jsonl.gz", b"\n<!DOCTYPE html>\n<html>", ["a.jsonl.gz: is a web page and not the data; it may"]),
        ("a.jsonl", GOOD + GOOD + b'["text"]\n', ["a.jsonl:3: a JSON list, not an object"]),
        (
            "a.json",
            b'[{"text": "a"}]',
            ["a.json:1: a JSON list, not an object; each line must be", "jq -c '.[]'"],
        ),
        ("a.jsonl", GOOD + b'{"id": 1, "body": "b"}\n', ["a.jsonl:2: no field 'text'", "'id', 'body'"]),
        ("a.jsonl", GOOD + b"{}\n", ["a.jsonl:2: no field 'text'", "none"]),
        ("a.jsonl", GOOD + b'{"text": null}\n', ["a.jsonl:2: field 'text' is null"]),
        ("a.jsonl", GOOD + b'{"text": ["a"]}\n', ["a.jsonl:2: field 'text' is list"]),
        ("a.jsonl", GOOD + b'{"text": "\xe9t\xe9"}\n', ["a.jsonl:2: invalid UTF-8", "0xe9 at position 11"]),
        ("a.jsonl.gz", gzip.compress(GOOD * 5, mtime=0)[:-9], ["a.jsonl.gz:", "cut off or damaged"]),
        ("a.jsonl.gz", GOOD, ["a.jsonl.gz:1: cut off or damaged"]),
        ("a.jsonl.gz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20, ["a.jsonl.gz:1: cut off or damaged"]),
        ("a.jsonl.zst", zstd(GOOD * 5)[:-3], ["a.jsonl.zst:", "cut off or damaged"]),
        ("a.jsonl.zst", zstd(GOOD) + zstd(GOOD)[:-3], ["a.jsonl.zst:2: cut off or damaged"]),
        ("a.jsonl.zst", GOOD, ["a.jsonl.zst:1: cut off or damaged"]),
        ("a.jsonl.bz2", bz2.compress(GOOD)[:-3], ["a.jsonl.bz2:", "cut off or damaged"]),
        ("a.jsonl.bz2", bz2.compress(GOOD) + GOOD, ["a.jsonl.bz2:", "cut off or damaged"]),
        ("a.jsonl.xz", lzma.compress(GOOD)[:-3], ["a.jsonl.xz:", "cut off or damaged"]),
        ("a.jsonl.xz", lzma.compress(GOOD) + GOOD, ["a.jsonl.xz:", "cut off or damaged"]),
        ("a.parquet", b"", ["a.parquet: not a complete Parquet file"]),
        ("a.parquet", b"PAR1" + bytes(50), ["a.parquet: not a complete Parquet file"]),
        ("a.parquet", pa.table({"text": pa.array([], pa.string())}), ["a.parquet: holds no documents"]),
        ("a.parquet", pa.table({"body": ["b"], "id": [1]}), ["a.parquet: no field 'text'", "'body', 'id'"]),
        ("a.arrow", b"", ["a.arrow: not a complete Arrow file"]),
        ("a.arrow", arrow([["a"]], file=True)[:-1], ["a.arrow: not a complete Arrow file"]),
        ("a.arrow", arrow([["a"], ["b"]])[:-8], ["a.arrow: not a complete Arrow file (no end-of-stream"]),
        ("a.arrow", arrow([["a"], [None]]), ["a.arrow: row 2: field 'text' is null"]),
        ("a.parquet", pa.table({"text": ["a", None]}), ["a.parquet: row 2: field 'text' is null"]),
        ("a.parquet", pa.table({"text": [1, 2]}), ["a.parquet: row 1: field 'text' is int"]),
        (
            "a.parquet",
            pa.table({"text": [b"a", b"\xff"]}),
            ["a.parquet: row 2: invalid UTF-8 in field 'text'"],
        ),
        (
            *("a.parquet", pa.table([["a"], ["b"]], names=["text", "text"])),
            ["a.parquet: several columns are called 'text'; leave one of them"],
        ),
        ("a.parquet", pa.table({"text": UTF8_COLUMN}), ["a.parquet: row 2: invalid UTF-8 in field 'text'"]),
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


def test_a_file_of_another_kind_is_no_few_bad_rows_among_many(tokenize, tmp_path: Path):
    """Its three rows would be a small share of the shard, and nobody would miss what the file should hold."""
    good, pointer = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_bytes(GOOD * 1000)
    pointer.write_bytes(POINTER)
    status, stderr, _record = tokenize(good, pointer, bad_rows="drop")
    assert status == 1 and "b.jsonl: is a pointer of Git LFS" in stderr


def test_a_parquet_file_with_a_damaged_page_is_named(tokenize, tmp_path: Path):
    path = parquet(tmp_path / "a.parquet", pa.table({"text": [f"document {i} " * 50 for i in range(200)]}))
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 500] = b"\xff" * 500
    path.write_bytes(data)
    status, stderr, _record = tokenize(path)
    assert status == 1
    assert "a.parquet: damaged after row" in stderr


# ---------------------------------------------------------------------------------------------- policies

ROWS = [
    b'{"text": "good"}',
    b'{"text": "cut',
    b'{"text": "a\\ud800b"}',
    b'{"text": "\xe2\x80!"}',
    b"[]",
    b'{"text": null}',
    b'{"body": "b"}',
    b'{"text": "' + b"x" * 200 + b'"}',
    b'{"text": "zero \\u0000"}',
]


def read(path: Path, **settings) -> tuple[list[tuple[int, str]], Drops]:
    drops = Drops()
    documents = read_documents(
        path, "text", settings=ReadSettings(max_line_bytes=100, **settings), drops=drops
    )
    return [(number, text) for number, text, _ in documents], drops


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_bad_rows_are_dropped_and_counted_where_the_settings_say_so(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.jsonl{suffix}"
    data = b"\n".join(ROWS)
    path.write_bytes({"": data, ".gz": gzip.compress(data, mtime=0), ".zst": zstd(data)}[suffix])
    kept, drops = read(path, bad_rows="drop", invalid_text="drop")
    assert kept == [(1, "good"), (9, "zero \0")]
    assert (drops.num_rows, drops.reasons) == (9, {"bad row": 5, "invalid text": 2})
    assert [(row["row"], row["detail"]) for row in drops.listed] == [
        (2, "invalid JSON (unexpected control character in string, column 14)"),
        (3, "a lone surrogate"),
        (4, "invalid UTF-8 (byte 0xe2 at position 11)"),
        (5, "a JSON list, not an object"),
        (6, "field 'text' is null, not text"),
        (7, "no field 'text'; the fields are 'body'"),
        (8, "a line of more than 100 bytes"),
    ]
    assert {row["file"] for row in drops.listed} == {str(path)}


@pytest.mark.parametrize("value", ["3", "null", "true", '"text"', "[" * 5000 + "]" * 5000])
def test_a_row_of_any_other_json_is_a_bad_row(tmp_path: Path, value: str):
    (tmp_path / "a.jsonl").write_bytes(value.encode() + b"\n" + GOOD)
    kept, drops = read(tmp_path / "a.jsonl", bad_rows="drop")
    assert (kept, drops.reasons) == ([(2, "good")], {"bad row": 1})


def test_a_row_that_is_nested_as_deeply_as_orjson_reads_is_read_or_a_bad_row(tmp_path: Path):
    row = b'{"a":' * 1000 + b"1" + b"}" * 999 + b',"text":": it seems to hold a key twice"}\n'
    (tmp_path / "a.jsonl").write_bytes(row + GOOD)
    drops, settings = Drops(), ReadSettings(bad_rows="drop")
    kept = list(read_documents(tmp_path / "a.jsonl", "text", settings=settings, drops=drops))
    assert [number for number, *_ in kept][-1] == 2
    assert drops.num_rows == len(kept) + drops.reasons["bad row"] == 2


def test_invalid_text_is_replaced_where_the_settings_say_so(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(ROWS[2:4]))
    kept, drops = read(path, invalid_text="replace")
    assert kept == [(1, "a\ufffdb"), (2, "\ufffd!")]
    assert (drops.reasons, drops.num_replaced) == ({}, 2)


@pytest.mark.parametrize("policy", ["replace", "drop"])
def test_invalid_text_of_parquet_follows_the_settings(tmp_path: Path, policy: str):
    messages = pa.ListArray.from_arrays([0, 1, 2], pa.StructArray.from_arrays([UTF8_COLUMN], ["content"]))
    table = pa.table({"text": ["x", "y"], "messages": messages})
    drops = Drops()
    rows = read_rows(
        parquet(tmp_path / "a.parquet", table),
        required=["text", "messages"],
        settings=ReadSettings(invalid_text=policy),
        drops=drops,
    )
    first = (1, {"text": "x", "messages": [{"content": "a"}]})
    second = (2, {"text": "y", "messages": [{"content": "\ufffd"}]})
    assert list(rows) == ([first, second] if policy == "replace" else [first])
    assert drops.num_replaced == (policy == "replace")
    assert drops.reasons == ({} if policy == "replace" else {"invalid text": 1})


def test_a_long_text_of_parquet_is_a_bad_row(tmp_path: Path):
    path = parquet(tmp_path / "a.parquet", pa.table({"text": ["é" * 50, "é" * 51]}))
    kept, drops = read(path, bad_rows="drop")
    assert (kept, drops.reasons) == ([(1, "é" * 50)], {"bad row": 1})


def test_a_line_of_just_the_limit_is_kept(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    line = b'{"text": "' + b"x" * 88 + b'"}'
    path.write_bytes(line + b"\r\n" + line + b"\n" + line)
    assert [number for number, _ in read(path)[0]] == [1, 2, 3]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_where_keeps_the_rows_with_one_of_the_values(tmp_path: Path, suffix: str):
    rows = [
        {"text": "a", "lang": "en", "used": ["x", "y"], "ok": True},
        {"text": "b", "lang": "de", "used": ["y"], "ok": True},
        {"text": "c", "lang": "en", "used": [], "ok": True},
        {"text": "d", "lang": None, "used": ["y"], "ok": True},
        {"text": "e", "lang": "fr", "used": ["y", "z"], "ok": False},
        {"text": "f", "lang": "fr", "used": ["y", "z"], "ok": True},
    ]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet(path, pa.Table.from_pylist(rows))
    else:
        path.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows))
    kept, drops = read(path, where={"lang": ["en", "fr"], "used": ["y"], "ok": [True]})
    assert kept == [(1, "a"), (6, "f")]
    assert (drops.num_rows, drops.reasons, drops.listed) == (6, {"filtered by where": 4}, [])


def test_bytes_are_text_to_filter_by(tmp_path: Path):
    path = parquet(tmp_path / "a.parquet", pa.table({"text": ["a", "b"], "lang": [b"en", b"de"]}))
    assert read(path, where={"lang": ["en"]})[0] == [(1, "a")]


def test_a_number_is_not_a_truth_value(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "n": 1}\n{"text": "b", "n": true}\n')
    assert read(path, where={"n": [1]})[0] == [(1, "a")]
    assert read(path, where={"n": [True]})[0] == [(2, "b")]


def test_a_whole_number_with_a_point_is_that_number(tmp_path: Path):
    """Programs write a column of whole numbers with gaps as floating-point numbers."""
    path = parquet(tmp_path / "a.parquet", pa.table({"text": ["a", "b", "c"], "n": [3.0, None, 3.5]}))
    assert read(path, where={"n": [3]})[0] == [(1, "a")]
    assert read(path, where={"n": [3]})[1].first_filtered == "n is None"


def test_decimals_and_days_of_parquet_are_compared_as_they_are_written(tmp_path: Path):
    """Data bases write whole numbers as decimals; in YAML and JSON a day is text."""
    numbers, day = [Decimal("3.00"), Decimal("3.50"), None], date(2026, 1, 31)
    table = pa.table({"text": ["a", "b", "c"], "n": numbers, "day": [None, day, date(2026, 2, 1)]})
    path = parquet(tmp_path / "a.parquet", table)
    assert read(path, where={"n": [3]})[0] == [(1, "a")]
    assert read(path, where={"day": ["2026-01-31"]})[0] == [(2, "b")]


def test_large_integers_beside_a_text_keep_their_digits(tmp_path: Path):
    """orjson reads those below -2^63 and above 2^64 - 1 as floating-point numbers."""
    ids = [123456789012345678901234567890, 2**64, 2**64 - 1, 10**19 - 1, -(2**63), -(2**63) - 1, -(10**19)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "a", "id":{number}}}\n' for number in ids))
    found = [row["id"] for _, _, row in read_documents(path, "text", optional=["id"])]
    assert found == ids and {*map(type, found)} == {int}
    assert read(path, where={"id": [2**64]})[0] == [(2, "a")]
    path.write_text('{"text": "a", "of": {"ids": [{"id": 18446744073709551616}]}}\n')
    assert [row["of"] for _, _, row in read_documents(path, "text", optional=["of"])] == [
        {"ids": [{"id": 2**64}]}
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_field_to_filter_by_that_is_missing_is_an_error_whatever_the_policy(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet(path, pa.table({"text": ["a"], "lang": ["en"]}))
    else:
        path.write_bytes(b'{"text": "a", "lang": "en"}\n')
    with pytest.raises(UserError, match="no field 'language'; the fields are 'text', 'lang'"):
        read(path, where={"language": ["en"]}, bad_rows="drop")


def test_dropped_rows_are_told_unless_the_configuration_asks_for_fewer():
    drops = Drops(num_rows=100)
    for row, reason in enumerate(("filtered by where", "too long"), 6):
        drops.add("raw/a.jsonl", row, reason)
    drops.reasons["after the limit"] = 50
    assert drops.told("docs") == ""
    drops.add("raw/a.jsonl", 8, "empty")
    drops.add("raw/a.jsonl", 9, "bad row", "invalid JSON")
    drops.add("raw/a.jsonl", 10, "empty")
    said = "docs: dropped 3 of 100 rows (2 x empty, 1 x bad row); the first is raw/a.jsonl:8: empty"
    assert drops.told("docs") == said


def test_too_many_dropped_rows_are_an_error_with_the_first_of_each_kind(tmp_path: Path):
    drops = Drops(num_rows=100)
    drops.add("raw/a.jsonl", 7, "filtered by where")
    drops.check(ReadSettings())
    drops.add("raw/a.jsonl", 8, "bad row", "invalid JSON")
    drops.check(ReadSettings())  # 1 of 100 is allowed
    drops.add("raw/a.jsonl", 9, "invalid text", "a lone surrogate")
    with pytest.raises(UserError) as error:
        drops.check(ReadSettings())
    assert str(error.value) == (
        "2 of 100 rows are bad or invalid, more than pretrain_data.max_dropped_fraction 0.01 allows; the "
        "first is raw/a.jsonl:8: invalid JSON; another: raw/a.jsonl:9: a lone surrogate; correct the files, "
        "or raise pretrain_data.max_dropped_fraction"
    )

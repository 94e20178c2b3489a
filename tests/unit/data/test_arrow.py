"""Columns without pandas, and footers that say what made a file."""

from __future__ import annotations

import errno
import json
from pathlib import Path

from snaketron.data import arrow
from snaketron.lineage.record import FOOTER
from snaketron.log import UserError

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COLUMNS = ["input_ids", "loss_mask", "seq_start_id"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of packs without rows, as rule pack_sft writes it."""
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS])
    schema = schema.with_metadata({FOOTER: json.dumps({"pack_size": 8}).encode()})
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_columns_of_text_may_hold_nothing(kind: pa.DataType):
    values = ["a", None, "", "ü\ud800"]  # the last has a lone surrogate, which Parquet cannot hold
    assert arrow.string_array(values, kind).to_pylist() == ["a", None, "", "ü?"]
    assert arrow.string_array([], kind).type == kind and not len(arrow.string_array([], kind))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        ("a", "a"),
        (1.5, "1.5"),
        (["ü", None], '["ü", null]'),
        ("ü".encode(), "ü"),  # as many programs write text to Parquet
        ({"a": b"\xff"}, '{"a": "\ufffd"}'),
    ],
)
def test_metadata_is_kept_as_text(value, text):
    assert arrow.text_of(value) == text


def test_a_footer_says_what_made_the_file(file):
    footer, written = arrow.read_footer(file, COLUMNS)
    assert (footer.num_rows, written) == (0, {"pack_size": 8})


def test_a_truncated_file_is_refused(file):
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet: damaged or not Parquet"):
        arrow.read_footer(file, COLUMNS)


def test_a_footer_that_is_damaged_inside_is_refused(file):
    """pyarrow raises OSError for it, without the name of the file: a job ended with a traceback."""
    whole = bytearray(file.read_bytes())
    begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    whole[begin : begin + 8] = b"\xff" * 8
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.parquet: damaged or not Parquet .*; delete it and run again"):
        arrow.read_footer(file, COLUMNS)


def test_a_file_that_the_system_does_not_give_need_not_be_damaged(file):
    """The user was to delete a file that only could not be read."""
    expected = pytest.raises(UserError, match=r"a\.parquet: cannot be read \(.* the server is gone\)$")
    with expected, arrow.opening(file):
        raise OSError(errno.ESTALE, "the server is gone")


def test_a_missing_file_is_refused(file):
    file.unlink()
    with pytest.raises(UserError, match=r"a\.parquet: no such file"):
        arrow.read_footer(file, COLUMNS)


def test_other_parquet_files_are_refused(tmp_path):
    pq.write_table(pa.table({"input_ids": [[1]], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column loss_mask, seq_start_id is missing"):
        arrow.read_footer(tmp_path / "a.parquet", COLUMNS)
    pq.write_table(pa.table({name: [[1]] for name in COLUMNS}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="the footer does not say what made it"):
        arrow.read_footer(tmp_path / "b.parquet", COLUMNS)

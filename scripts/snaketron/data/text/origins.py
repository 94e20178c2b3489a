"""Where the sequences of a tokenized shard come from: Parquet beside the bins, one row a sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from snaketron.config.data import SPLITS
from snaketron.data.arrow import number_array, schema_with, string_array, view
from snaketron.data.text.binidx import naming

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = {
    "split": pa.dictionary(pa.int8(), pa.string()),
    "sequence": pa.int64(),
    "file": pa.string(),
    "row": pa.int64(),
    "tokens": pa.int32(),
}
_ROW_GROUP = 1 << 16  # rows


@dataclass
class Sequences:
    """Some sequences, in the order of their documents."""

    splits: np.ndarray  # index in SPLITS
    indices: np.ndarray  # in the .bin of the split
    files: list[str]
    rows: np.ndarray
    tokens: np.ndarray
    metadata: list[Sequence[str | None]]  # a value for each metadata field

    def table(self, schema: pa.Schema) -> pa.Table:
        columns = [
            pa.DictionaryArray.from_arrays(number_array(self.splits, pa.int8()), string_array(SPLITS)),
            number_array(self.indices, pa.int64()),
            string_array(self.files),
            number_array(self.rows, pa.int64()),
            number_array(self.tokens, pa.int32()),
            *(string_array(values) for values in zip(*self.metadata, strict=True)),
        ]
        return pa.Table.from_arrays(columns, schema=schema)


class Writer:
    """Streams rows to a file; `final` is the path that errors name."""

    def __init__(self, path: Path | IO[bytes], fields: Sequence[str], final: Path) -> None:
        self._schema = schema_with(COLUMNS.items(), {"kind": "documents"}, fields, final.name)
        self._final = final
        self._tables: list[pa.Table] = []
        self._num_rows = 0
        with naming(final):
            self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", write_statistics=False)

    def write(self, sequences: Sequences) -> None:
        self._write(sequences.table(self._schema))

    def _write(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._num_rows += table.num_rows
        if self._num_rows >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._num_rows:
            with naming(self._final):
                self._writer.write_table(pa.concat_tables(self._tables), row_group_size=1 << 30)
        self._tables, self._num_rows = [], 0

    def close(self) -> None:
        self._flush()
        with naming(self._final):
            self._writer.close()

    def abandon(self) -> None:
        """Let go of the file; what is buffered may have no room."""
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()


def renumber(source: IO[bytes], writer: Writer, new: Mapping[int, np.ndarray]) -> None:
    """Copy all rows to `writer`; the sequence `old` of a split gets the index new[split][old]."""
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(_ROW_GROUP):
            splits, old = (view(column) for column in (batch.column(0).indices, batch.column(1)))
            indices = np.empty_like(old)
            for split, numbers in new.items():
                mine = splits == split
                indices[mine] = numbers[old[mine]]
            columns = [*batch.columns]
            columns[1] = number_array(indices, pa.int64())
            writer._write(pa.Table.from_arrays(columns, schema=writer._schema))

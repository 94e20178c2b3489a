"""Packed conversations on disk: Parquet in the columns that Megatron-Bridge reads.

A row is a pack, in three columns:

input_ids     ids of whole conversations, without padding; the trainer pads them where a layout needs it, and
              packs leave room for that (`padding_multiple`)
loss_mask     aligned with the labels: mask[j] says whether token j + 1 is trained; the last position of a
              conversation is 0
seq_start_id  where each conversation begins

The footer says what the packs were made with and for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from snaketron.data.arrow import (
    check_expected,
    flatten,
    list_array,
    read_footer,
    row_groups,
    schema_with,
)

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("seq_start_id", pa.list_(pa.int32())),
    ]
)
ROW_GROUP_TOKENS = 16_384  # a random read decodes no more than this (80 kB), or one pack
FOOTER_ROW_GROUPS = 65_536  # footers of files with so many stay in memory, at 3 kB a row group


class Pack(NamedTuple):
    input_ids: np.ndarray
    loss_mask: np.ndarray
    seq_start_id: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each conversation."""
        return np.diff(self.seq_start_id, append=len(self.input_ids))

    def places(self, multiple: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions of all tokens, after each conversation is padded to a `multiple`.

        Also gives the position at which each conversation begins, and the last one ends.
        """
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-self.lengths // multiple) * multiple)])
        moved = np.repeat(starts[:-1] - self.seq_start_id, self.lengths)
        return np.arange(len(self.input_ids)) + moved, starts


def join(conversations: Sequence[tuple[np.ndarray, np.ndarray]]) -> Pack:
    """One pack of conversations, each given as ids and, for each token, whether the assistant wrote it."""
    lengths = [len(input_ids) for input_ids, _ in conversations]
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
    loss_mask = np.zeros(sum(lengths), dtype=np.uint8)
    for start, length, (_, trained) in zip(starts, lengths, conversations, strict=True):
        loss_mask[start : start + length - 1] = trained[1:]
    return Pack(np.concatenate([input_ids for input_ids, _ in conversations]), loss_mask, starts)


def loss_weights(
    pack: Pack, depths: int, average: Literal["token", "sample"]
) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each position's loss, and the totals by which the weighted sums are divided.

    Row k of the weights (1 + depths, tokens) is for predicting the token k + 1 positions ahead. With "token",
    a position weighs 1 if that token is trained; with "sample", the positions of a conversation weigh 1
    together. The totals (1 + depths,) count trained tokens, or conversations with trained tokens.
    """
    weights = np.zeros((1 + depths, len(pack.loss_mask)), dtype=np.float32)
    totals = np.zeros(1 + depths)
    lengths = pack.lengths
    left = np.repeat(pack.seq_start_id + lengths, lengths) - np.arange(len(pack.loss_mask))
    for depth in range(1 + depths):
        row = weights[depth]
        row[: max(0, len(row) - depth)] = pack.loss_mask[depth:]
        row[left <= depth] = 0  # the label belongs to the next conversation
        if average == "token":
            totals[depth] = row.sum(dtype=np.float64)
        else:
            trained = np.add.reduceat(row, pack.seq_start_id, dtype=np.float64)
            row /= np.repeat(np.maximum(trained, 1), lengths)
            totals[depth] = np.count_nonzero(trained)
    return weights, totals


# ------------------------------------------------------------------------------------------ writing


def write(path: Path, packs: Iterable[Pack], metadata: Mapping[str, Any]) -> None:
    """Write packs and the footer; without packs, a valid file of no rows."""
    schema = schema_with(SCHEMA, metadata)
    # Without a dictionary, zstd sees the ids in their order and finds what is repeated: a quarter smaller.
    options = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(path, schema, **options) as writer:
        group: list[Pack] = []
        num_tokens = 0
        for pack in packs:
            if group and num_tokens + len(pack.input_ids) > ROW_GROUP_TOKENS:
                writer.write_table(_table(group, schema))
                group, num_tokens = [], 0
            group.append(pack)
            num_tokens += len(pack.input_ids)
        if group:
            writer.write_table(_table(group, schema))


def _table(packs: Sequence[Pack], schema: pa.Schema) -> pa.Table:
    columns = [
        list_array([getattr(pack, field.name) for pack in packs], field.type.value_type) for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


# ------------------------------------------------------------------------------------------ reading


class _RowGroup(NamedTuple):
    """A decoded row group: for each column, the values of all packs and the offset of each pack."""

    columns: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def num_bytes(self) -> int:
        return sum(values.nbytes + offsets.nbytes for values, offsets in self.columns)

    def pack(self, row: int) -> Pack:
        return Pack(*(values[offsets[row] : offsets[row + 1]] for values, offsets in self.columns))


class _Cache[Key, Value]:
    """Keeps the values used last: as many as have `limit` together by `size`, and at least one."""

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self.limit, self.size, self.used = limit, size, 0
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        self.used += self.size(value)
        while self.used > self.limit and len(self._values) > 1:
            self.used -= self.size(self._values.popitem(last=False)[1])
        return value


class PackedDataset:
    """Random access to the packs of several files, as one sequence.

    The footers are read at once, and compared with `expected` (`tokenizer_sha256`, `template_sha256`,
    `pack_size`, ...); the data is read when it is asked for, a row group at a time, and kept while
    `cache_bytes` last. The arrays are read-only views of the cache: copy what you keep.
    """

    def __init__(
        self, files: Sequence[Path], expected: Mapping[str, Any], *, cache_bytes: int = 256 * 2**20
    ) -> None:
        self.files = [Path(file) for file in files]
        self.row_groups_decoded = 0
        self._groups: _Cache[tuple[int, int], _RowGroup] = _Cache(cache_bytes, lambda g: g.num_bytes)
        self._footers: _Cache[int, tuple[pq.FileMetaData, dict[str, Any]]] = _Cache(
            FOOTER_ROW_GROUPS, lambda footer: footer[0].num_row_groups
        )
        self._first_rows: dict[int, np.ndarray] = {}  # by file: the first row of each row group, and the end
        rows = [0]
        for number, path in enumerate(self.files):
            footer, metadata = self._footer(number)
            check_expected(path, metadata, expected)
            rows.append(footer.num_rows)
        self._first_row = np.cumsum(rows)  # the first row of each file, and the end

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, index: int) -> Pack:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        number = int(np.searchsorted(self._first_row, index, side="right")) - 1
        row = index - int(self._first_row[number])
        first_rows = self._row_groups_of(number)
        group = int(np.searchsorted(first_rows, row, side="right")) - 1
        decoded = self._groups.get((number, group), lambda: self._decode(number, group))
        return decoded.pack(row - int(first_rows[group]))

    def _footer(self, number: int) -> tuple[pq.FileMetaData, dict[str, Any]]:
        return self._footers.get(number, lambda: read_footer(self.files[number], SCHEMA.names))

    def _row_groups_of(self, number: int) -> np.ndarray:
        if number not in self._first_rows:
            footer, _ = self._footer(number)
            sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            self._first_rows[number] = np.cumsum([0, *sizes])
        return self._first_rows[number]

    def _decode(self, number: int, group: int) -> _RowGroup:
        self.row_groups_decoded += 1
        path = self.files[number]
        # Opened for each row group and closed: thousands of shards would use up the open files otherwise.
        (table,) = row_groups(path, SCHEMA.names, [group], self._footer(number)[0])
        return _RowGroup(tuple(flatten(table.column(name)) for name in SCHEMA.names))

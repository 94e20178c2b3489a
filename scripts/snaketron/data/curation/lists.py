"""Lists of numbers by name, in one Parquet file from which one list can be read without the others.

One job makes the lists of all shards of a group, and a rule's outputs share its wildcards, so these lists are
one file. Each name has row groups of its own, in order; the footer holds the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from snaketron.data.arrow import number_array, read_footer, schema_with, view
from snaketron.log import UserError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

COLUMN = "value"
_GROUP = 1 << 26  # numbers of a row group at most: pyarrow writes no larger ones


def write(path: Path, lists: Mapping[str, np.ndarray], dtype: Any, about: dict[str, Any]) -> None:
    """Write the lists; `about` goes into the footer."""
    value_type = pa.from_numpy_dtype(np.dtype(dtype))
    footer = about | {"names": list(lists), "lengths": [len(values) for values in lists.values()]}
    schema = schema_with([(COLUMN, value_type)], footer)
    with pq.ParquetWriter(
        path, schema, compression="zstd", write_statistics=False, use_dictionary=False
    ) as writer:
        for values in lists.values():
            if len(values):
                array = number_array(values, value_type)
                table = pa.Table.from_arrays([array], schema=schema)
                writer.write_table(table, row_group_size=_GROUP)


class Lists:
    """The lists of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._footer, self.about = read_footer(path, [COLUMN])
        self.names: list[str] = self.about["names"]
        lengths = dict(zip(self.names, self.about["lengths"], strict=True))
        groups = iter(range(self._footer.num_row_groups))
        # A list that is empty has no row group.
        self._groups = {name: [*islice(groups, -(-length // _GROUP))] for name, length in lengths.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise UserError(f"{self.path}: nothing about {name}; delete it and run again")
        groups = self._groups[name]
        if not groups:
            return np.empty(0, dtype=np.uint32)
        with pq.ParquetFile(self.path, metadata=self._footer) as file:
            column = file.read_row_groups(groups, columns=[COLUMN], use_threads=False).column(COLUMN)
        return np.concatenate([view(chunk) for chunk in column.chunks])

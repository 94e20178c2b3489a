"""Lists of numbers in one file: each is read by its name."""

from __future__ import annotations

from pathlib import Path

from snaketron.data.curation.lists import Lists, write
from snaketron.log import UserError

import numpy as np
import pytest


def test_a_list_is_read_by_its_name(tmp_path: Path):
    """One is longer than pyarrow lets a row group be, and one is empty."""
    lists = {"a": np.ones(2**26 + 3, np.uint8), "b": np.array([], np.uint8), "c": np.array([7, 8], np.uint8)}
    write(tmp_path / "lists.parquet", lists, np.uint8, {"kind": "k"})
    found = Lists(tmp_path / "lists.parquet")
    assert found.names == ["a", "b", "c"] and found.about["kind"] == "k" and "d" not in found
    for name, values in lists.items():
        assert np.array_equal(found[name], values)
    with pytest.raises(UserError, match=r"lists\.parquet: nothing about d; delete it and run again"):
        found["d"]

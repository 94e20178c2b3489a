"""A pair of .bin and .idx is described, or refused with both numbers."""

from __future__ import annotations

from pathlib import Path

from snaketron.data.text import binidx
from snaketron.log import UserError

import numpy as np
import pytest


def write_pair(
    prefix: Path, lengths: list[int], *, documents: list[int] | None = None, code: int = 8
) -> Path:
    """A pair of sequences of zeros, with the .idx as the format says."""
    offsets = np.cumsum([0, *lengths])[:-1] * 2
    bounds = list(range(len(lengths) + 1)) if documents is None else documents
    prefix.with_suffix(".bin").write_bytes(bytes(2 * sum(lengths)))
    header = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + code.to_bytes(1, "little")
    header += len(lengths).to_bytes(8, "little") + len(bounds).to_bytes(8, "little")
    arrays = np.array(lengths, np.int32), np.array(offsets, np.int64), np.array(bounds, np.int64)
    prefix.with_suffix(".idx").write_bytes(header + b"".join(a.tobytes() for a in arrays))
    return prefix


def test_a_complete_pair_is_described(tmp_path):
    assert binidx.check(write_pair(tmp_path / "a", [3, 1]), "") == binidx.Pair("uint16", 2, 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.with_suffix(".bin").unlink(), "a.bin: no such file"),
        (lambda p: p.with_suffix(".idx").unlink(), "a.idx: no such file"),
        (lambda p: p.with_suffix(".bin").write_bytes(bytes(6)), "a.bin: 6 bytes, where a.idx promises 8"),
        (
            lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:20]),
            "a.idx: 20 bytes, shorter than the header of 34",
        ),
        (lambda p: p.with_suffix(".idx").write_bytes(bytes(82)), "a.idx: no index of Megatron"),
        (
            lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-8]),
            "a.idx: 74 bytes, where 2 sequences take 82",
        ),
        (lambda p: write_pair(p, [3, 1], code=4), "a.bin: 8 bytes, where a.idx promises 10"),
        (lambda p: write_pair(p, [3, 1], documents=[0, 2]), "a.idx: 1 documents of 2 sequences"),
        (
            lambda p: write_pair(p, [3, 1], documents=[0, 2, 2]),
            "a.idx: its 2 documents are not one sequence each",
        ),
        (lambda p: write_pair(p, [4, 0]), "a.idx: its offsets do not follow from its 2 lengths"),
    ],
)
def test_a_damaged_pair_is_an_error_with_both_numbers(tmp_path, damage, message):
    prefix = write_pair(tmp_path / "a", [3, 1])
    damage(prefix)
    with pytest.raises(UserError) as error:
        binidx.check(prefix, "make it again")
    assert message in str(error.value) and "; make it again" in str(error.value)

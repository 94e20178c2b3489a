"""The formats of raw files, known by the ends of their names, in upper or lower case; and Git LFS."""

from __future__ import annotations

import re
from pathlib import Path

_COMPRESSED = ("", ".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (
    *(kind + compressed for kind in (".jsonl", ".ndjson", ".json") for compressed in _COMPRESSED),
    *(".parquet", ".arrow"),
)
READABLE = ".jsonl, .ndjson or .json (also .gz, .zst, .bz2 or .xz), .parquet or .arrow"
MAX_NAMED = 5  # files that are not read, in a line
_END = re.compile(f"(?:{'|'.join(map(re.escape, SUFFIXES))})\\Z")
# Names of downloaded files. A name has no point before its suffix, so FILE.json, a record, never matches.
DOWNLOADED = r"[a-z0-9_]+\.(?:(?:jsonl?|ndjson)(?:\.(?:gz|zst|bz2|xz))?|parquet|arrow)"


# What Git leaves in the place of a large file that it was not told to fetch, and what to do about it.
POINTER = b"version https://git-lfs"
IS_POINTER = "a pointer of Git LFS"
FETCH = "fetch the file with `git lfs pull`"


def is_pointer(path: Path) -> bool:
    """Whether a file is only a pointer of Git LFS."""
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def suffix_of(path: str) -> str:
    """The one of `SUFFIXES` that a path ends in; "" for a file that cannot be read."""
    found = _END.search(path.lower())  # the first that is found is the longest
    return found[0] if found else ""


def without_suffix(path: str) -> str:
    return path[: len(path) - len(suffix_of(path))]

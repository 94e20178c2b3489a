"""The formats of raw files, known by the ends of their names, in upper or lower case."""

from __future__ import annotations

_COMPRESSED = ("", ".gz", ".zst", ".bz2", ".xz")
SUFFIXES = (
    *(kind + compressed for kind in (".jsonl", ".ndjson", ".json") for compressed in _COMPRESSED),
    *(".parquet", ".arrow"),
)
READABLE = ".jsonl, .ndjson or .json (also .gz, .zst, .bz2 or .xz), .parquet or .arrow"
# Names of downloaded files. A name has no point before its suffix, so FILE.json, a record, never matches.
DOWNLOADED = r"[a-z0-9_]+\.(?:(?:jsonl?|ndjson)(?:\.(?:gz|zst|bz2|xz))?|parquet|arrow)"


def suffix_of(path: str) -> str:
    """The one of `SUFFIXES` that a path ends in; "" for a file that cannot be read."""
    lower = path.lower()
    return max((suffix for suffix in SUFFIXES if lower.endswith(suffix)), key=len, default="")


def without_suffix(path: str) -> str:
    return path[: len(path) - len(suffix_of(path))]

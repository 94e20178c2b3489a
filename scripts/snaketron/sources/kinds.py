"""Raw files that hold something else than their names say."""

from __future__ import annotations

from pathlib import Path

from snaketron.log import UserError
from snaketron.sources.formats import FETCH, IS_POINTER, POINTER, suffix_of

START = 64  # bytes that tell what a file holds

# How files begin that are read by their suffix.
_SUFFIXES = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": ".bz2",
    b"\xfd7zXZ\0": ".xz",
    b"PAR1": ".parquet",
    b"ARROW1": ".arrow",
}
# How files begin that programs leave in the place of the wanted ones: what they are, and what to do.
_IN_PLACE = {
    POINTER: (IS_POINTER, FETCH),
    b"<!doctype": ("a web page", "it may ask for a login or tell of an error; download the file again"),
    b"<html": ("a web page", "it may ask for a login or tell of an error; download the file again"),
}


def check_kind(path: Path, start: bytes) -> None:
    """`UserError` where the first bytes of a file show that it is of another kind than its name says.

    No line of JSON begins like this. Where bad rows are dropped, such a file would be a few of them.
    """
    for begins, suffix in _SUFFIXES.items():
        if start.startswith(begins) and not suffix_of(path.name).endswith(suffix):
            raise UserError(f"{path}: holds what a file in {suffix} does; add {suffix} to its name")
    check_content(str(path), start)


def check_content(place: str, start: bytes) -> None:
    """`UserError` where the first bytes of a file show that a program left it in the place of the data."""
    for begins, (what, fix) in _IN_PLACE.items():
        if start.lstrip().lower().startswith(begins):
            raise UserError(f"{place}: is {what} and not the data; {fix}")

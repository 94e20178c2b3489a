"""One Snakemake at a time in a working directory, by a lock that a killed one does not leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from snaketron import files

_held: list[TextIO] = []  # open for the life of the process


def hold(path: Path) -> bool:
    """Try to own `path` until this process ends, however it ends; False if another process owns it.

    Snakemake's own lock is a file that stays after SIGKILL and asks for `--unlock`; the profiles turn
    it off in favour of this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    if not files.lock(file):
        file.close()
        return False
    _held.append(file)
    return True

"""Secrets of a training: from its environment, or from a file that only its owner can read."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from snaketron.config import SECRET
from snaketron.log import UserError


def read(path: str | None) -> dict[str, str]:
    """The variables of a file with lines NAME=value; empty without one.

    Blank lines and those that begin with # are left out. Raises `UserError`, which never holds a value, when
    others may read the file or a line is something else.
    """
    if path is None:
        return {}
    file = Path(path).expanduser()
    at = f"cluster.secrets_file {file}"
    try:
        mode = file.stat().st_mode
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{at}: {(error.strerror or str(error)).lower()}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(
            f"{at}: its mode is {stat.S_IMODE(mode):o}, so others can read it; run chmod 600 {file}"
        )
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UserError(f"{at}, line {number}: not NAME=value")
        found[name.strip()] = value.strip()
    return found


class Redact(logging.Filter):
    """Takes the values of secrets in this process' environment out of a log.

    `snakemake --verbose` is passed on to every job, and some executors then log the whole environment there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values = [v for name, v in os.environ.items() if SECRET.search(name) and len(v) >= 8]

    def filter(self, record: logging.LogRecord) -> bool:
        if self.values:
            text = record.getMessage()
            if any(value in text for value in self.values):
                for value in self.values:
                    text = text.replace(value, "[secret]")
                record.msg, record.args = text, ()
        return True

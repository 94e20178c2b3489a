"""Errors of the user in a line, without a traceback: unknown targets, --configfile and --config."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snaketron.config import ConfigError
from snaketron.graph import configfiles
from snaketron.log import UserError


def tell_wrong_targets() -> None:
    """Have Snakemake print a `ConfigError` of an input function as it is, and not with a traceback."""
    from snakemake.exceptions import InputFunctionException, WorkflowError

    original = InputFunctionException.__init__

    def init(self: Any, msg: Any, *args: Any, **keys: Any) -> None:
        original(self, msg, *args, **keys)
        if isinstance(msg, ConfigError):
            self.__class__ = WorkflowError
            self.__init__(str(msg))

    InputFunctionException.__init__ = init


EVERY_WORD = "The option takes every word up to the next option, so targets stand before it, or after `--`"


def tell_wrong_configfiles() -> None:
    """Have Snakemake name in a line a file of --configfile that is not there or cannot be read.

    It opens the file outside of the block that would turn the error into a message, before it reads the
    Snakefile, and says neither the file nor the line of what is no YAML.
    """
    from snakemake.exceptions import WorkflowError
    from snakemake.settings import types

    original = types.load_configfile

    def load(path: Path) -> Any:
        if not Path(path).is_file():
            raise WorkflowError(f"--configfile {path}: no such file. {EVERY_WORD}")
        try:
            return configfiles.read(Path(path), original)
        except UserError as error:
            raise WorkflowError(str(error)) from None

    types.load_configfile = load


def tell_wrong_keys() -> None:
    """Have Snakemake name in a line a word of --config that it cannot read, with one that it can."""
    from snakemake import cli
    from snakemake.exceptions import WorkflowError

    original = cli.parse_config

    def parse(words: Sequence[str] | None) -> Any:
        for word in words or ():
            try:
                original([word])
            except ValueError:
                raise WorkflowError(f"--config {shlex.quote(word)}: {_meant(word)}") from None
        return original(words)

    cli.parse_config = parse


def _meant(word: str) -> str:
    """What to write in place of a word of --config.

    >>> _meant("sft.train_iters=200")
    "write --config 'sft={train_iters: 200}'"
    """
    path, equals, value = word.partition("=")
    if not equals:
        return f"not KEY=VALUE. {EVERY_WORD}"
    first, *rest = path.split(".")
    if not rest:
        return f"{path!r} is no key of the configuration"
    for name in reversed(rest):
        value = f"{{{name}: {value}}}"
    return f"write --config {shlex.quote(f'{first}={value}')}"

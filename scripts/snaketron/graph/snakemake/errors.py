"""Errors of the user in a line, without a traceback: targets of unknown names, files of --configfile."""

from __future__ import annotations

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
            raise WorkflowError(
                f"--configfile {path}: no such file. The option takes every word up to the next option, so "
                "targets stand before it, or after `--`"
            )
        try:
            return configfiles.read(Path(path), original)
        except UserError as error:
            raise WorkflowError(str(error)) from None

    types.load_configfile = load

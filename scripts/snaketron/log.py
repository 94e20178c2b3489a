"""How a script speaks: facts with numbers on standard error, and errors that tell the user what to do."""

from __future__ import annotations

import errno
import logging
import signal
import sys
from collections.abc import Callable

logger = logging.getLogger("snaketron")

_NO_SPACE = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "file too large",
}


class UserError(Exception):
    """What is wrong, where (file and line, or configuration path), and what to do about it."""


def run(main: Callable[[], int]) -> None:
    """Run a script's `main` and leave with its exit status.

    A `UserError` and a full disk end in one line on standard error and status 1, an interrupt in
    status 130; anything else is our mistake and keeps its traceback.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    try:
        status = main()
    except UserError as error:
        status = _complain(str(error))
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        name = error.filename or "the output"
        status = _complain(
            f"cannot write {name}: {_NO_SPACE[error.errno]}; free some and run the same command again"
        )
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1

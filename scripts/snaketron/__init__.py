"""The package under the workflow: all logic."""

import os
import sys
from types import TracebackType

# numpy starts a thread for each core when it is imported, and each looks for work in a loop before it sleeps:
# 0.1 s of CPU on 2 cores in every program. Nothing here multiplies matrices with numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


_print = sys.excepthook


def _complain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, but none of Ctrl-C: programs import for a second before `log.run` obeys it."""
    if not issubclass(kind, KeyboardInterrupt):
        _print(kind, error, trace)


sys.excepthook = _complain

"""What a process that writes a checkpoint in the background says of its writes."""

from __future__ import annotations

import pickle
import queue
import tempfile


class WriteResults:
    """A queue in a file that both processes have open: the one that trains and its fork, which writes.

    megatron-core has a third process for this. The first save starts it and waits while it imports what the
    training does, and a killed training leaves it behind.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as it may be read

    def put(self, results: object) -> None:
        """Write the results, which must be picklable; `OSError` where the disk is full."""
        pickle.dump(results, self.file)
        self.file.flush()

    def get_nowait(self) -> object:
        """The results; `queue.Empty` as long as there are none."""
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except EOFError:
            raise queue.Empty from None

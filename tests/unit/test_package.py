"""What importing the package does for every program."""

from __future__ import annotations

import os
import subprocess
import sys

THREADS = "import os, snaketron, numpy; print(len(os.listdir('/proc/self/task')))"


def test_numpy_starts_no_threads_unless_it_is_told_to():
    """The libraries under it would start one for each core."""
    given = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    for told, threads in ({}, 1), ({"OPENBLAS_NUM_THREADS": "3"}, min(3, os.cpu_count() or 1)):
        said = subprocess.check_output([sys.executable, "-c", THREADS], env=given | told)
        assert int(said) == threads

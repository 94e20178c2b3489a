"""What importing the package does for every program, and the maps of its rooms."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from snaketron import graph, jobs

import pytest

THREADS = "import os, snaketron, numpy; print(len(os.listdir('/proc/self/task')))"


def test_numpy_starts_no_threads_unless_it_is_told_to():
    """The libraries under it would start one for each core."""
    given = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    for told, threads in ({}, 1), ({"OPENBLAS_NUM_THREADS": "3"}, min(3, os.cpu_count() or 1)):
        said = subprocess.check_output([sys.executable, "-c", THREADS], env=given | told)
        assert int(said) == threads


@pytest.mark.parametrize("room", [graph, jobs], ids=["graph", "jobs"])
def test_a_map_names_each_module_of_its_room(room):
    assert room.__doc__ and room.__file__
    named = set(re.findall("`([a-z_]+)`", room.__doc__))
    there = {path.stem for path in Path(room.__file__).parent.iterdir() if not path.name.startswith("_")}
    assert named == there

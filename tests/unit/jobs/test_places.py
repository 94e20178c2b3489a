"""Where processes are that hang, in words, and as a process in a library says it itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from snaketron.jobs import places
from snaketron.jobs.places import Place


def test_those_that_others_wait_for_come_first_and_few_of_many_are_named():
    found = [Place(rank, "n", 9 if rank > 7 else 8, f"f{max(rank, 12)} (a.py)", "") for rank in range(16)]
    assert places.sentence(found, 18) == (
        "ranks 16, 17 say nothing; ranks 0, 1, 2, 3, 4, 5, 6, 7 are behind: after step 8 in f12 (a.py); "
        "rank 13 after step 9 in f13 (a.py); rank 14 after step 9 in f14 (a.py); 6 elsewhere"
    )
    late = places.behind(found)
    assert late and late.rank == 0


def test_a_process_alone_is_no_comparison():
    alone = [Place(0, "n", 0, "compute (train/losses.py, item)", "")]
    assert places.sentence(alone, 1) == "rank 0: before the first step in compute (train/losses.py, item)"
    assert places.behind(alone) is None
    assert places.sentence([], 2) == "no process says where it is"


def test_a_process_says_where_it_is_while_a_library_has_it(tmp_path: Path):
    """Python runs no handler of a signal then, as in a collective; here it computes for hours."""
    program = f"""
import hashlib, os, threading, time
from pathlib import Path
from snaketron.jobs import places

def count():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

def ask():
    time.sleep(0.5)
    os.kill(os.getpid(), places.ASK)
    while not [*Path({str(tmp_path)!r}).glob("place_*.json")]:
        time.sleep(0.01)
    os._exit(0)

places.has_done(7)
places.answer(Path({str(tmp_path)!r}), 3)
threading.Thread(target=ask).start()
count()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    (found,) = places.read(tmp_path)
    assert (found.rank, found.steps, found.at) == (3, 7, "count (<string>)")
    assert "in <module>" in found.stack

"""Where the processes of a training are that hangs: its supervisor asks them all before it kills them.

Most of them wait in a collective for one that has not come there. Python runs no handler of a signal
meanwhile, but hands the number on to a file (`signal.set_wakeup_fd`), which a thread reads.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import snaketron
from snaketron.files import read_json, write_json
from snaketron.wording import after, some

ASK = signal.SIGUSR2
GROUPS = 3  # of processes that a sentence names

_PACKAGE = Path(snaketron.__file__).parent
_steps = 0  # that this process has done, as far as it said


@dataclass(frozen=True)
class Place:
    """Where a process was when it was asked."""

    rank: int
    host: str
    steps: int  # done before
    at: str  # the function of Snaketron, and what it called
    stack: str


def has_done(steps: int) -> None:
    """Note how many steps this process has done."""
    global _steps
    _steps = steps


def answer(directory: Path, rank: int) -> None:
    """Let a thread write where this process is, in a file of `directory`, whenever the supervisor asks."""
    asked, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(ASK, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    main = threading.get_ident()

    def write_place() -> None:
        while received := os.read(asked, 1):  # the number of any signal that has a handler
            if received[0] == ASK:
                write_json(directory / f"place_{rank:05d}.json", asdict(_place(rank, main)))

    threading.Thread(target=write_place, daemon=True).start()


def _place(rank: int, thread: int) -> Place:
    frames = traceback.extract_stack(sys._current_frames()[thread])
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)] or frames
    file = Path(own[-1].filename)
    file = file.relative_to(_PACKAGE) if file.is_relative_to(_PACKAGE) else Path(file.name)
    called = f", {frames[-1].name}" if frames[-1] is not own[-1] else ""
    stack = "".join(traceback.format_list(frames)).rstrip()
    return Place(rank, socket.gethostname(), _steps, f"{own[-1].name} ({file}{called})", stack)


def read(directory: Path) -> list[Place]:
    """What the processes have answered, by rank."""
    return [Place(**read_json(path)) for path in sorted(directory.glob("place_*.json"))]


def behind(places: Sequence[Place]) -> Place | None:
    """One for which the others seem to wait; None where all are equal."""
    groups = _groups(places)
    return groups[0][0] if len(groups) > 1 else None


def sentence(places: Sequence[Place], world: int) -> str:
    """Where `world` processes are, those first that the others wait for.

    >>> sentence([Place(0, "a", 6, "read (x.py)", ""), Place(1, "a", 7, "wait (y.py)", "")], 2)
    'rank 0 is behind: after step 6 in read (x.py); rank 1 after step 7 in wait (y.py)'
    >>> sentence([Place(rank, "a", 6, "wait (y.py)", "") for rank in (0, 2)], 3)
    'rank 1 says nothing; ranks 0, 2 after step 6 in wait (y.py)'
    >>> sentence([Place(rank, "a", 6, "wait (y.py)", "") for rank in (0, 1)], 2)
    'all ranks are equally far: after step 6 in wait (y.py)'
    """
    groups = _groups(places)
    silent = sorted({*range(world)} - {place.rank for place in places})
    if not groups:
        return "no process says where it is"
    if len(groups) == 1 and not silent:
        return f"{'all ranks are equally far' if world > 1 else 'rank 0'}: {_where(groups[0])}"
    said = [f"{_ranks(silent)} {'says' if len(silent) == 1 else 'say'} nothing"] if silent else []
    for number, group in enumerate(groups[:GROUPS]):
        ranks = _ranks([place.rank for place in group])
        late = number == 0 and len(groups) > 1 and group[0].steps < groups[1][0].steps
        is_behind = f" {'is' if len(group) == 1 else 'are'} behind:" if late else ""
        said.append(f"{ranks}{is_behind} {_where(group)}")
    others = sum(map(len, groups[GROUPS:]))
    return "; ".join(said) + (f"; {others} elsewhere" if others else "")


def _groups(places: Sequence[Place]) -> list[list[Place]]:
    """The processes that are at one place, by their steps and then their number."""
    found = defaultdict(list)
    for place in places:
        found[place.steps, place.at].append(place)
    return sorted(found.values(), key=lambda group: (group[0].steps, len(group), group[0].rank))


def _where(group: Sequence[Place]) -> str:
    return f"{after(group[0].steps)} in {group[0].at}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {some(ranks, 8)}"

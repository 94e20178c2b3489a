"""The live view drawn: what `live.View` holds, in as many columns and rows as a terminal has."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from snaketron.report.live import Rule, Training, View
from snaketron.report.progress import SIGNS
from snaketron.wording import duration, plural, short_duration

from rich.console import Console, Group, RenderableType
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
DOTS = "╌"  # what a bar still lacks, also without colours
CURVE = 24  # columns of a curve
NARROW, NARROW_CURVE = 60, 10  # columns below which a terminal is narrow, and those of a curve there
SHORTEST_BAR = 6
RULES, JOBS, FAILED, QUEUE = 8, 5, 3, 4  # lines of each
STYLES = {
    "running": "cyan",
    "finished": "green",
    "failed": "bold red",
    "stopped": "yellow",
    "waiting": "dim",
}
STATES = {
    "running": "running for",
    "finished": "finished after",
    "failed": "failed after",
    "stopped": "stopped after",
}


def curve(values: Sequence[float], columns: int) -> str:
    """Values as a curve of blocks. A column is the mean of as many as it stands for.

    >>> curve([8, 8, 6, 4, 2, 1], 3), curve([3.0], 8), curve([], 8)
    ('█▅▁', '▁', '')
    """
    finite = [value for value in values if abs(value) < float("inf")]  # neither NaN
    if not finite:
        return ""
    columns = min(columns, len(finite))
    cuts = [len(finite) * i // columns for i in range(columns + 1)]
    means = [statistics.fmean(finite[a:b]) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    steps = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * steps)] for mean in means)


def render(view: View, width: int) -> RenderableType:
    """The view in `width` columns; what matters most is above."""
    if not view.state:
        return Text("No run of the workflow in this directory yet.")
    parts: list[RenderableType] = [_header(view, width)]
    if view.warning:
        training, warning = view.warning
        parts.append(_line(f"! {training}, step {warning.iteration}: {warning.text}", "yellow"))
    parts += _bars(view, width)
    parts += _jobs(view)
    parts += [_line(f"✗ {title}", STYLES["failed"]) for title in view.failed[:FAILED]]
    if len(view.failed) > FAILED:
        parts.append(_line(f"✗ and {len(view.failed) - FAILED} more failed", STYLES["failed"]))
    parts += [
        _line(f"○ {title}{f'  x {count}' if count > 1 else ''}", "dim")
        for title, count in view.waiting[:QUEUE]
    ]
    if len(view.waiting) > QUEUE:
        parts.append(_line(f"○ and {len(view.waiting) - QUEUE} more waiting", "dim"))
    return Group(*parts)


def drawn(view: View, width: int, height: int, *, colors: bool = True) -> list[str]:
    """The lines of the view, with the codes of colours, for a terminal of that size."""
    console = Console(
        width=max(20, width - 1),  # a full line would make some terminals begin another one
        height=height,
        force_terminal=True,
        no_color=not colors or None,  # None: as NO_COLOR says
        color_system="auto" if colors else None,
        legacy_windows=False,
        highlight=False,
        emoji=False,
        markup=False,
    )
    with console.capture() as capture:
        console.print(render(view, console.width))
    return capture.get().splitlines()[: max(1, height - 2)]


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _header(view: View, width: int) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    words = f" {STATES[view.state]}" if width >= NARROW else ""
    text.append(f"{SIGNS[view.state]}{words} {duration(view.seconds)}", STYLES[view.state])
    text.append(f"  {view.done:,}/{view.total:,}{' jobs' if words else ''}")
    if view.state == "running":
        text.append(f"  {_left(view)}", "bold")
    return text


def _left(view: View) -> str:
    if view.seconds_left is None:
        return "time left not known yet"
    return f"{'over' if view.at_least else 'about'} {short_duration(view.seconds_left)} left"


def _bars(view: View, width: int) -> list[Text]:
    """A bar for each stage: rules of data, then trainings, with losses below those that have some."""
    finished, rules = _folded(view.rules)
    rows = []
    if finished:
        done = sum(rule.done for rule in finished)
        rows.append(_Row(plural(len(finished), "data stage"), "finished", done, done))
    rows += [_Row(rule.name, rule.state, rule.done, rule.total) for rule in rules[:RULES]]
    if hidden := rules[RULES:]:
        done, total = sum(rule.done for rule in hidden), sum(rule.total for rule in hidden)
        rows.append(_Row(f"{len(hidden)} more", "waiting", done, total))
    rows += [_Row(one.name, one.state, one.done, one.total, _said(one, width)) for one in view.trainings]
    counts = max((len(row.count) for row in rows), default=0)
    names = min(max((len(row.name) for row in rows), default=0), max(8, width - counts - 4 - SHORTEST_BAR))
    return [line for row in rows for line in row.lines(names, counts, width)]


@dataclass(frozen=True)
class _Row:
    """A stage: its bar, and for a training what is said below it."""

    name: str
    state: str
    done: int
    total: int
    said: str = ""

    @property
    def count(self) -> str:
        return f"{self.done:,}/{self.total:,}" if self.total else ""

    def lines(self, names: int, counts: int, width: int) -> list[Text]:
        style = STYLES[self.state]
        name = self.name if len(self.name) <= names else f"{self.name[: names - 1]}…"
        room = max(4, width - names - counts - 4)
        done, total = (self.done, self.total) if self.total else (self.state == "finished", 1)
        filled = min(room, room * done // total)
        line = Text(f"{SIGNS[self.state]} {name:{names}} ", style, no_wrap=True, overflow="ellipsis")
        line.append("━" * filled + DOTS * (room - filled)).append(f" {self.count:>{counts}}")
        return [line, _line(f"  {self.said}")] if self.said else [line]


def _folded(rules: Iterable[Rule]) -> tuple[list[Rule], list[Rule]]:
    """The rules that are one line because they are finished, and the others: what moves before what waits."""
    every = list(rules)
    finished = [rule for rule in every if rule.state == "finished"]
    rest = [rule for rule in every if rule.state != "finished"]
    rest.sort(key=lambda rule: ("failed", "stopped", "running", "waiting").index(rule.state))
    return finished, rest


def _said(one: Training, width: int) -> str:
    """Loss, speed and time of a training that has begun, in one line."""
    if one.state == "waiting" and one.loss is None:
        return ""
    said = [f"loss {one.loss:.3f}"] if one.loss is not None else []
    said += filter(None, [one.about, curve(one.curve, CURVE if width >= NARROW else NARROW_CURVE)])
    if one.tokens_per_second:
        said.append(f"{one.tokens_per_second:,.0f} tokens/s")
    if one.state == "running" and one.seconds_left is not None:
        said.append(f"{short_duration(one.seconds_left)} left")
    return "  ".join(said)


def _jobs(view: View) -> list[Text]:
    longest = sorted(view.running, key=lambda job: -job.seconds)
    lines = [
        _line("  ".join(filter(None, (f"▶ {job.title}", short_duration(job.seconds), job.where))), "cyan")
        for job in longest[:JOBS]
    ]
    if len(longest) > JOBS:
        lines.append(_line(f"▶ and {len(longest) - JOBS} more running", "cyan"))
    return lines

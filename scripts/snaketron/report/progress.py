"""The graph of a run, with the state and the time of each rule, as a drawing and as a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape

from snaketron.report.blocks import OWN, UNKNOWN, Block, Figure, Listing, Part, Table, Text
from snaketron.report.runs import Run
from snaketron.report.workflow import RULES, Rule
from snaketron.wording import plural, short_duration

SIGNS = {
    "finished": "✓",
    "running": "▶",
    "failed": "✗",
    "stopped": "■",
    "partly": "◐",
    "waiting": "○",
    "not finished": "◐",
}
_WIDTH, _HEIGHT, _ROW, _LANE = 112, 38, 58, 122  # of a box, and from one to the next
_LETTERS = 19  # of a name that may be too wide for its box
_BESIDE = 5  # how far beside the boxes of a lane an arrow passes them


def sign(state: str) -> str:
    """A state in a word that also a sign tells.

    >>> sign("failed")
    '✗ failed'
    """
    return f"{SIGNS[state]} {state}"


def progress_part(run: Run) -> Part:
    """The rules of a run: what comes from what, how far each is, and what failed."""
    if not run.rules:
        return Part("Graph", [Text("No job has left a log, a benchmark or a record yet.", attention=True)])
    blocks: list[Block] = [_drawing(run.rules), _table(run.rules)]
    for rule in run.rules.values():
        for state in ("failed", "stopped"):
            if jobs := rule.unfinished_in(state):
                lines = [f"logs/{log}: {said or 'it says nothing'}" for log, said in jobs.items()]
                blocks.append(Listing(f"{state.title()}: {plural(len(lines), 'job')} of {rule.name}", lines))
    return Part("Graph", blocks)


def _table(rules: Mapping[str, Rule]) -> Table:
    rows = []
    for rule in rules.values():
        taken = (sum(rule.seconds), max(rule.seconds)) if rule.seconds else ()
        times = [short_duration(seconds) for seconds in taken] or [UNKNOWN] * 2
        memory = f"{rule.peak_mb:,.0f}" if rule.peak_mb else UNKNOWN
        rows.append([rule.name, sign(rule.state), f"{rule.done:,} of {rule.expected:,}", *times, memory])
    header = ["rule", "state", "jobs done", "time of all jobs", "longest job", "peak memory (MB)"]
    return Table("State and time of each rule", header, rows, names=2)


def _edges(rules: Mapping[str, Rule]) -> list[tuple[str, str]]:
    """What comes from what, without what follows from the others."""

    def above(name: str) -> set[str]:
        direct = {need for need in RULES[name][1] if need in rules}
        return direct.union(*(above(need) for need in direct))

    edges = []
    for name in rules:
        needs = [need for need in RULES[name][1] if need in rules]
        edges += [(need, name) for need in needs if not any(need in above(other) for other in needs)]
    return edges


def _places(rules: Mapping[str, Rule], edges: Sequence[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """The lane and the row of each rule: below what it is made from, and on nothing else."""
    places: dict[str, tuple[int, int]] = {}
    for name in rules:
        row = max((places[above][1] + 1 for above, below in edges if below == name), default=0)
        while (RULES[name][0], row) in places.values():
            row += 1
        places[name] = RULES[name][0], row
    return places


def _drawing(rules: Mapping[str, Rule]) -> Figure:
    edges = _edges(rules)
    places = {name: (2 + lane * _LANE, 2 + row * _ROW) for name, (lane, row) in _places(rules, edges).items()}
    height = max(y for _, y in places.values()) + _HEIGHT + 2
    shapes = [_arrow(places[above], places[below], set(places.values())) for above, below in edges]
    shapes += [_box(rules[name], *place) for name, place in places.items()]
    words = []
    for rule in rules.values():
        needs = ", ".join(above for above, below in edges if below == rule.name)
        words.append(f"{rule.name} {rule.state}" + (f", made from {needs}" if needs else ""))
    alt = f"Graph of the rules: {'; '.join(words)}."
    marker = (
        f'<defs><marker id="{OWN}arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>'
    )
    svg = (
        f'<svg viewBox="0 0 {2 * _LANE + _WIDTH + 14} {height}" role="img" aria-label="{escape(alt)}" '
        f'class="graph">{marker}{"".join(shapes)}</svg>'
    )
    return Figure("What is made from what", alt, svg)


def _box(rule: Rule, x: int, y: int) -> str:
    seconds = f" · {short_duration(sum(rule.seconds))}" if rule.seconds else ""
    state = SIGNS[rule.state] if rule.state == "finished" else sign(rule.state)
    about = f"{state} {rule.done}/{rule.expected}{seconds}"
    fitted = (
        f' textLength="{_WIDTH - 8}" lengthAdjust="spacingAndGlyphs"' if len(rule.name) > _LETTERS else ""
    )
    return (
        f'<g class="{rule.state}"><rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5"/>'
        f'<text x="{x + _WIDTH / 2}" y="{y + 15}"{fitted}>{escape(rule.name.replace("_", " "))}</text>'
        f'<text x="{x + _WIDTH / 2}" y="{y + 30}" class="about">{escape(about)}</text></g>'
    )


def _arrow(above: tuple[int, int], below: tuple[int, int], boxes: Collection[tuple[int, int]]) -> str:
    """An arrow down its own lane and then across, between two rows; it passes boxes beside them."""
    (x, y), (to_x, to_y) = above, below
    right, middle = x + _WIDTH, _HEIGHT // 2
    turn = to_y - (_ROW - _HEIGHT)  # below the boxes of its own lane
    if x == to_x and to_y - y > _ROW:
        out = right + 13
        line = f"M{right} {y + middle}C{out} {y + middle} {out} {to_y + middle} {right} {to_y + middle}"
    else:
        at, start, to = x + _WIDTH // 2, f"M{x + _WIDTH // 2} {y + _HEIGHT}", to_x + _WIDTH // 2
        if any(lane == x and y < row < to_y for lane, row in boxes):
            side = right if to_x > x else x
            at = side + (_BESIDE if to_x > x else -_BESIDE)
            start = f"M{side} {y + middle}Q{at} {y + middle} {at} {y + _HEIGHT}"
        line = f"{start}V{turn}C{at} {to_y - 4} {to} {turn + 4} {to} {to_y}"
    return f'<path class="edge" d="{line}" marker-end="url(#{OWN}arrow)"/>'

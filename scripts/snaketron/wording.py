"""Numbers, sizes and durations in words: the one place that decides how a person reads them.

The library humanize is not used: it has no unit with a fixed digit ("1.8 M parameters"), and writes
durations as phrases, where lines that follow each other want "26:03:04".
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence

FACTORS = (1e12, 1e9, 1e6, 1e3)
THOUSANDS = ("T", "B", "M", "k")
BYTES = ("TB", "GB", "MB", "kB")


def large(number: float, units: tuple[str, ...] = THOUSANDS) -> str:
    """A large number with a unit.

    >>> large(120_600_000_000), large(29_200_000, BYTES), large(999)
    ('120.6 B', '29.2 MB', '999')
    """
    for factor, unit in zip(FACTORS, units, strict=True):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number:.0f}"


def size_text(size: float) -> str:
    """A number of bytes, to two or three digits.

    >>> size_text(3.4e9), size_text(340e6), size_text(5)
    ('3.4 GB', '340 MB', '5 bytes')
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def short(value: float, _position: int = 0) -> str:
    """A number for an axis of matplotlib, which gives its position too.

    >>> short(1200), short(0.25)
    ('1.2 k', '0.25')
    """
    for factor, unit in zip(FACTORS, THOUSANDS, strict=True):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def binary(value: int) -> str:
    """A power of two for an axis.

    >>> binary(8192)
    '8 Ki'
    """
    for shift, unit in ((30, " Gi"), (20, " Mi"), (10, " Ki")):
        if value >> shift:
            return f"{value >> shift}{unit}"
    return str(value)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(93784)
    '26:03:04'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}"


DURATIONS = {"days": 86_400, "h": 3600, "min": 60, "s": 1}  # units of `short_duration`, in seconds


def short_duration(seconds: float) -> str:
    """A time in the unit that fits it.

    >>> short_duration(0.3), short_duration(90), short_duration(7300), short_duration(259_200)
    ('0.3 s', '1.5 min', '2.0 h', '3.0 days')
    """
    for unit, least in (("days", 172_800), ("h", 3600), ("min", 60)):
        if seconds >= least:
            return f"{seconds / DURATIONS[unit]:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def counted(numbers: Mapping[str, int], *, empty: str = "none", sign: str = " x ") -> str:
    """Reasons and how often each holds, without those that never do.

    >>> counted({"empty": 3, "too long": 1, "bad row": 0}), counted({"empty": 3}, sign=" "), counted({})
    ('3 x empty, 1 x too long', '3 empty', 'none')
    """
    return ", ".join(f"{number}{sign}{reason}" for reason, number in numbers.items() if number) or empty


def plural(number: int, noun: str) -> str:
    """A number of things.

    >>> plural(1, "GPU"), plural(2, "process")
    ('1 GPU', '2 processes')
    """
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def after(step: int) -> str:
    """When something is, by the steps that a training has done.

    >>> after(12), after(0)
    ('after step 12', 'before the first step')
    """
    return f"after step {step}" if step else "before the first step"


def some(names: Sequence[object], most: int = 12) -> str:
    """Names, the first ones of many.

    >>> some(range(14)), some("abc", 2)
    ('0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more', 'a, b and 1 more')
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def shortened(text: str, most: int) -> str:
    """The beginning of a long text.

    >>> shortened("a long text", 6), shortened("a text", 6)
    ('a long...', 'a text')
    """
    return text if len(text) <= most else f"{text[:most]}..."


def ended_with(status: int) -> str:
    """How a process ended, by its status as `subprocess` gives it (-9 for SIGKILL) or srun and shells (137).

    >>> ended_with(-11), ended_with(3)
    ('was killed by SIGSEGV', 'ended with status 3')
    """
    number = -status if status < 0 else status - 128
    if 0 < number < signal.NSIG:
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(number).name}{hint}"
    return f"ended with status {status}"

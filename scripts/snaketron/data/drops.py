"""Rows that cannot be used: an error that names the place, or dropped and counted, as the settings say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from snaketron.log import UserError, logger
from snaketron.settings.text import ReadSettings
from snaketron.sources.formats import suffix_of
from snaketron.sources.kinds import START, check_kind
from snaketron.wording import counted

BAD_ROW = "bad row"
INVALID_TEXT = "invalid text"
FILTERED = "filtered by where"
TOO_LONG = "too long"
AFTER_LIMIT = "after the limit"
ASKED = {FILTERED, TOO_LONG, AFTER_LIMIT}  # reasons for which the configuration asks for fewer rows
MAX_LISTED = 100  # dropped rows that a record names, for each reason
MAX_DETAIL = 200  # characters
MAX_EXAMPLES = 5  # dropped rows in an error
BUFFER = 1 << 20  # bytes
NAME_ONE = "name one of them in the configuration (text_field, messages_field or where)"
REPLACE = "replace the file with a complete copy and run again"
ARROW = (".parquet", ".arrow")


@dataclass
class Drops:
    """Rows that are not used: how many for each reason, and which."""

    reasons: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, Any]] = field(default_factory=list)
    num_rows: int = 0  # rows that were read, used or not
    num_replaced: int = 0  # rows in whose text U+FFFD replaced invalid characters
    first_filtered: str = ""  # the value for which `where` did not let the first row pass
    advice: Mapping[str, str] = field(default_factory=dict)  # what to do, by reason

    def add(self, path: Path | str, row: int, reason: str, detail: str = "") -> None:
        """Count row `row` of the file `path`."""
        self.reasons[reason] += 1
        if self.reasons[reason] <= MAX_LISTED:
            entry = {"file": str(path), "row": row, "reason": reason, "detail": detail[:MAX_DETAIL]}
            self.listed.append(entry)

    def check(self, settings: ReadSettings, reasons: Iterable[str] = (BAD_ROW, INVALID_TEXT)) -> None:
        """`UserError`, with an example of each reason, where more rows were dropped than the settings allow.

        Call this after the last file. Rows that were dropped for other reasons than `reasons` do not count.
        """
        bad = {reason: self.reasons[reason] for reason in reasons if self.reasons[reason]}
        dropped = sum(bad.values())
        if dropped <= settings.max_dropped_fraction * self.num_rows:
            return
        limit = f"{settings.section}.max_dropped_fraction"
        first = {row["reason"]: row for row in reversed(self.listed) if row["reason"] in bad}
        examples = sorted(first.values(), key=self.listed.index)[:MAX_EXAMPLES]
        others = "".join(f"; another: {self._explain(row)}" for row in examples[1:])
        raise UserError(
            f"{dropped} of {self.num_rows} rows are bad or invalid, more than {limit} "
            f"{settings.max_dropped_fraction} allows; the first is {self._explain(examples[0])}{others}; "
            f"correct the files, or raise {limit}"
        )

    def told(self, where: str) -> str:
        """How many rows of `where` were dropped that the configuration does not ask to drop, and the first.

        Empty where there are none. The job of a shard says it in its log; on the terminal it is said once of
        all shards (`tell_of_shards`).
        """
        unasked = {reason: n for reason, n in self.reasons.most_common() if n and reason not in ASKED}
        if not unasked:
            return ""
        first = next(row for row in self.listed if row["reason"] in unasked)
        return (
            f"{where}: dropped {sum(unasked.values())} of {self.num_rows} rows ({counted(unasked)}); "
            f"the first is {self._explain(first)}"
        )

    def explained(self) -> str:
        """Why all of them were dropped: how many for each reason, and the first ones."""
        first = [f"{FILTERED}: {self.first_filtered}"] if self.first_filtered else []
        first += [self._explain(row) for row in self.listed[:1]]
        return "; ".join([counted(dict(self.reasons.most_common()), empty=""), *first])

    def _explain(self, row: Mapping[str, Any]) -> str:
        """A dropped row in a line: where, why and what to do."""
        reason, where = row["reason"], place(Path(row["file"]), row["row"])
        named = "" if reason in (BAD_ROW, INVALID_TEXT) else reason  # the detail names the problem
        advice = f"({self.advice[reason]})" if reason in self.advice else ""
        why = ": ".join(part for part in (named, row["detail"]) if part)
        return f"{where}: {why} {advice}".rstrip()


def tell_of_shards(
    what: str, counts: Mapping[Path, Mapping[str, Any]], rows: str, advice: Mapping[str, str] | None = None
) -> None:
    """A warning of the rows that the shards of a corpus or source lost, and where they are listed.

    Args:
        what: name of the corpus or source, for the warning.
        counts: those of the shards' records, by the path of the record.
        rows: the name of the count of rows.
        advice: what to do, by reason.
    """
    drops = Drops(advice=advice or {})
    for of_shard in counts.values():
        drops.reasons.update(of_shard["dropped"])
        drops.listed += of_shard["dropped_rows"]
        drops.num_rows += of_shard[rows]
    if said := drops.told(what):
        one, *others = counts
        where = one.with_name("*.json") if others else one
        logger.warning("%s; dropped_rows in %s lists them", said, where)


@dataclass
class Bad(Exception):
    """Why a row cannot be used."""

    detail: str
    fix: str
    reason: str = BAD_ROW


TOO_DEEP = Bad("objects or lists are nested too deeply", "correct or remove the row")


def place(path: Path, number: int) -> str:
    """How errors name row `number` (from 1) of a file: FILE:LINE, or a row of Parquet or Arrow."""
    return f"{path}: row {number}" if suffix_of(path.name) in ARROW else f"{path}:{number}"


def reject(bad: Bad, path: Path, number: int, settings: ReadSettings, drops: Drops) -> None:
    """Stop at a row, or drop and count it, as the settings say."""
    policy = settings.invalid_text if bad.reason == INVALID_TEXT else settings.bad_rows
    if policy != "drop":
        key, values = (
            ("invalid_text", "replace or drop") if bad.reason == INVALID_TEXT else ("bad_rows", "drop")
        )
        other = f"; or set {settings.section}.{key} to {values}" if settings.section else ""
        raise UserError(f"{place(path, number)}: {bad.detail}; {bad.fix}{other}") from None
    drops.add(path, number, bad.reason, bad.detail)


def too_large(what: str, settings: ReadSettings) -> Bad:
    """A line or field of more bytes than the settings allow."""
    other = f", or raise {settings.section}.max_line_bytes" if settings.section else ""
    return Bad(f"{what} more than {settings.max_line_bytes} bytes", f"correct it{other}")


def missing(where: str, name: str, present: Iterable[str]) -> str:
    return f"{where}: {no_field(name, present)}; {NAME_ONE}"


def no_field(name: str, present: Iterable[str]) -> str:
    return f"no field {name!r}; the fields are {', '.join(map(repr, present)) or 'none'}"


def open_raw(path: Path) -> BinaryIO:
    """A raw file of the kind that its name says."""
    try:
        with path.open("rb") as file:
            check_kind(path, file.read(START))
        return path.open("rb", buffering=BUFFER)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; restore it, or take it out of the configuration") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see to it and run again") from None

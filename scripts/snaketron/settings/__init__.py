"""What one job is told, from the configuration.

What defines the result of a job is a `params` of its rule, so a change runs it again; how it is run is not.
"""

from __future__ import annotations

from collections import ChainMap
from typing import Any

from snaketron.config import ChatSource, Corpus, Section
from snaketron.log import UserError

from pydantic import Field, ValidationError


def taken[T: Section](kind: type[T], *sections: Section, **own: Any) -> T:
    """Settings of a kind: the value of a key is that of `own`, else that of the first section that has it."""
    known = ChainMap(own, *(dict(section) for section in sections))
    return kind(**{key: known[key] for key in kind.model_fields if key in known})


def read_settings[T: Section](kind: type[T], text: str, option: str = "--settings") -> T:
    """The settings that an option of a command line has as JSON; `UserError` where they are no such."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in error.errors()]
        raise UserError(f"{option}: {'; '.join(problems)}; paste what `snakemake -np` prints") from None


def of_one_split(source: Corpus | ChatSource) -> dict[str, Any]:
    """The fractions of a source that is of one split as a whole: they have no part in it."""
    return {"valid_fraction": 0.0, "test_fraction": 0.0} if source.split else {}


def unless(default: Any) -> Any:
    """A field that is left out of the JSON where it has its default: a new one makes nothing again."""
    return Field(default, exclude_if=lambda value: value == default)

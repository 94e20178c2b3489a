"""What one job is told, from the configuration.

What defines the result of a job is a `params` of its rule, so a change runs it again; how it is run is not.
"""

from __future__ import annotations

from collections import ChainMap
from typing import Any

from snaketron.config import Section


def taken[T: Section](kind: type[T], *sections: Section, **own: Any) -> T:
    """Settings of a kind: the value of a key is that of `own`, else that of the first section that has it."""
    known = ChainMap(own, *(dict(section) for section in sections))
    return kind(**{key: known[key] for key in kind.model_fields if key in known})

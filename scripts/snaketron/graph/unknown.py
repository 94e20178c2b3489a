"""Targets that name what the configuration has not: a message with the names that are known."""

from __future__ import annotations

from collections.abc import Mapping

from snaketron.config import ConfigError
from snaketron.config.base import closest
from snaketron.wording import some

MOST = 10  # names that a message lists


def find[T](what: str, name: str, known: Mapping[str, T]) -> T:
    """What `known` has under a name that a target gave.

    `ConfigError` where it has nothing, such as `no phase of pretraining is called 'foo'; did you mean
    'focused'? Known: broad, focused`.
    """
    if name in known:
        return known[name]
    names = sorted(known)
    listed = f" Known: {some(names, MOST)}" if names else ""
    close = closest(name, names)
    raise ConfigError(f"no {what} is called {name!r}{f'; did you mean {close!r}?' if close else '.'}{listed}")

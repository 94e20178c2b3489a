"""Name the results that are given and not made: a rule registers them, and another one makes the rest.

Both rules have the names in their wildcard constraints.
"""

from __future__ import annotations

from typing import Literal

from snaketron.config import Config

type Kind = Literal["corpora", "chats", "phases"]

_ANY = "[a-z0-9_]+"  # the constraint of a name without this one


class RegisteredGraph:
    """Answers which corpora, sources of conversations and phases of pretraining were made elsewhere.

    Two rules have the same outputs, one to make them and one to register them; constraints on the name say
    which one it is.
    """

    def __init__(self, config: Config) -> None:
        self._given: dict[Kind, list[str]] = {
            "corpora": [c.name for c in config.corpora if c.registered],
            "chats": [c.name for c in config.chats if c.registered],
            "phases": [p.name for p in config.pretrain.phases if p.checkpoint],
        }

    def names(self, kind: Kind) -> str:
        """A regular expression of the names that are registered; where there are none, nothing matches it."""
        return "|".join(self._given[kind]) or "(?!)"

    def others(self, kind: Kind) -> str:
        """A regular expression of all other names."""
        return rf"(?!(?:{self.names(kind)})(?:/|$)){_ANY}" if self._given[kind] else _ANY

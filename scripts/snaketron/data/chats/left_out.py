"""Conversations of which no pack is made: how many, why, and which size of packs takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from snaketron.wording import counted


@dataclass
class LeftOut:
    """What is left out of the packs of a shard, or of all shards of a source."""

    reasons: Counter[str] = field(default_factory=Counter)
    conversations: int = 0  # packed or not
    needed: Counter[str] = field(default_factory=Counter)  # conversations by the pack size that they need

    def add(self, splits: Iterable[Mapping[str, Any]], needed: Mapping[str, int]) -> None:
        """Add the counts of each split of a shard, and what `pack.smallest_packs` says of the shard."""
        for counts in splits:
            self.reasons.update(counts["dropped"])
            self.conversations += counts["conversations"]
        self.needed.update(needed)

    def told(self, where: str, pack_size: int) -> str:
        """How many of `where`, why, and what larger packs would keep; empty where there are none."""
        if not self.reasons.total():
            return ""
        said = (
            f"{where}: {self.reasons.total()} of {self.conversations} conversations are left out "
            f"({counted(self.reasons, sign=' ')})"
        )
        larger = sorted(size for size in map(int, self.needed) if size > pack_size)
        if larger:
            kept = (f"{size} tokens keep {self._kept(size):.1%}" for size in larger[:4])
            said += f"; packs of {', '.join(kept)}"
        return said

    def _kept(self, size: int) -> float:
        return sum(number for at, number in self.needed.items() if int(at) <= size) / self.conversations

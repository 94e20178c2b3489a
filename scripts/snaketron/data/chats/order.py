"""Which pack holds a conversation, and at what places a training reads that pack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketron.data.chats.mixing import mix
from snaketron.data.chats.pack import TOO_LONG, Conversations, not_packed, plan
from snaketron.data.chats.packs import PackedDataset
from snaketron.log import UserError
from snaketron.settings.chats import PackSettings

import numpy as np

AGAIN = "another version of the code packs otherwise; ask with the one that made it"


class Packing:
    """How rendered files were packed. It is done again in memory, from the lengths alone."""

    def __init__(self, chats: Sequence[Path], settings: Mapping[str, Any], split: str) -> None:
        """`chats` are in the order in which they were packed, `settings` those of the record of the packs."""
        known = {key: settings[key] for key in PackSettings.model_fields if key in settings}
        packing = PackSettings.model_validate(known)
        self.pack_size = packing.pack_size
        self._found = Conversations.read(chats, packing)
        self._plan = plan(self._found, split, packing)

    def packs_of(self, wanted: Sequence[int], packed: Path) -> dict[int, int]:
        """The pack of each wanted conversation that is in one, as its number in the file `packed`.

        Conversations are counted through all files. The tokens of what is wanted are compared.
        """
        made = self._plan
        places = np.flatnonzero(np.isin(made.indices, wanted))
        numbers = np.searchsorted(made.offsets, places, side="right") - 1
        dataset = PackedDataset([packed], {})
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            if number >= len(dataset):
                raise UserError(f"{packed}: has {len(dataset)} packs, and one is number {number}; {AGAIN}")
            pack, inside = dataset[number], place - int(made.offsets[number])
            start = int(pack.seq_start_id[inside]) if inside < len(pack.seq_start_id) else 0
            ids, _ = self._found.tokens(made.indices[place : place + 1])
            if not np.array_equal(pack.input_ids[start : start + len(ids)], ids):
                raise UserError(f"{packed}: pack {number} does not hold the conversation; {AGAIN}")
        return dict(zip(made.indices[places].tolist(), numbers.tolist(), strict=True))

    def why_not(self, number: int) -> str:
        """Why a conversation is in no pack."""
        found = not_packed(self._found, self.pack_size)
        reason = next(reason for reason, which in found.items() if which[number])
        size = f" ({self._found.lengths[number]} tokens, pack_size {self.pack_size})"
        return f"{reason}{size if reason == TOO_LONG else ''}"


class PackOrder:
    """For each sample of a training, the pack of the blend that it is."""

    def __init__(self, blend: Mapping[str, Any], num_samples: int, seed: int) -> None:
        """`blend` is the content of blend.json."""
        sources = blend["splits"]["train"]
        self._places: dict[str, tuple[int, int]] = {}  # of a file: its source, and its first pack in that
        sizes = []
        for number, source in enumerate(sources):
            first = 0
            for file in source["files"]:
                self._places[file["path"]] = number, first
                first += file["packs"]
            sizes.append(first)
        self._sources, self._packs = mix(sizes, [source["weight"] for source in sources], num_samples, seed)

    def samples(self, packs: Iterable[tuple[str, int]]) -> np.ndarray:
        """The numbers of the samples that are some packs, in rising order.

        Each is the path of its file, as the blend has it, and its number there.
        """
        found = np.zeros(len(self._packs), bool)
        for path, pack in packs:
            if path in self._places:
                source, first = self._places[path]
                found |= (self._sources == source) & (self._packs == first + pack)
        return np.flatnonzero(found)

"""Which pack holds a conversation, and at what places a training reads that pack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketron.data.chats.mixing import mix
from snaketron.data.chats.pack import Conversations, plan
from snaketron.data.chats.packs import PackedDataset
from snaketron.log import UserError

import numpy as np

AGAIN = "another version of the code packs otherwise; ask with the one that made it"


def packs_of(
    chats: Sequence[Path], settings: Mapping[str, Any], split: str, wanted: Sequence[int], packed: Path
) -> dict[int, int]:
    """The pack of each wanted conversation that is in one, as its number in the file `packed`.

    Packing is done again in memory, from the lengths alone, and the tokens of what is wanted are compared.

    Args:
        chats: rendered files, in the order in which they were packed.
        settings: of the record of `packed`.
        wanted: numbers of conversations, counted through all files.
    """
    size, long_conversations = settings["pack_size"], settings["long_conversations"]
    found = Conversations.read(chats, size, long_conversations)
    multiple, algorithm = settings["padding_multiple"], settings["algorithm"]
    made = plan(found, split, size, algorithm, settings.get("seed"), multiple)
    places = np.flatnonzero(np.isin(made.indices, wanted))
    numbers = np.searchsorted(made.offsets, places, side="right") - 1
    dataset = PackedDataset([packed], {})
    for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
        if number >= len(dataset):
            raise UserError(f"{packed}: has {len(dataset)} packs, and one is number {number}; {AGAIN}")
        pack, inside = dataset[number], place - int(made.offsets[number])
        start = int(pack.seq_start_id[inside]) if inside < len(pack.seq_start_id) else 0
        ids, _ = found.tokens(made.indices[place : place + 1])
        if not np.array_equal(pack.input_ids[start : start + len(ids)], ids):
            raise UserError(f"{packed}: pack {number} does not hold the conversation; {AGAIN}")
    return dict(zip(made.indices[places].tolist(), numbers.tolist(), strict=True))


def why_not_packed(chats: Sequence[Path], settings: Mapping[str, Any], number: int) -> str:
    """Why a conversation is in no pack."""
    found = Conversations.read(chats, settings["pack_size"], settings["long_conversations"])
    if found.lengths[number] > settings["pack_size"]:
        return f"longer than a pack ({found.lengths[number]} tokens, pack_size {settings['pack_size']})"
    if found.cut[number]:
        return "longer than a pack, which no answer fits in"
    return "nothing to train on"


def samples(
    blend: Mapping[str, Any], packs: Iterable[tuple[str, int]], num_samples: int, seed: int
) -> np.ndarray:
    """The numbers of a training's samples that are some packs, in rising order.

    Args:
        blend: the content of blend.json.
        packs: each the path of its file, as the blend has it, and its number there.
        num_samples: of the training.
    """
    sources = blend["splits"]["train"]
    places: dict[str, tuple[int, int]] = {}  # of a file: its source, and the number of its first pack there
    sizes = []
    for number, source in enumerate(sources):
        first = 0
        for file in source["files"]:
            places[file["path"]] = number, first
            first += file["packs"]
        sizes.append(first)
    order = mix(sizes, [source["weight"] for source in sources], num_samples, seed)
    found = np.zeros(num_samples, bool)
    for path, pack in packs:
        if path in places:
            source, first = places[path]
            found |= (order[0] == source) & (order[1] == first + pack)
    return np.flatnonzero(found)

"""The pack that holds a conversation, and the steps that trained on it: real packs, a blend and its order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from snaketron.data.chats import blend, pack
from snaketron.data.chats.order import PackOrder
from snaketron.data.chats.sequences import SCHEMA, Sequence, table
from snaketron.data.trace.fate import Fate, fates
from snaketron.lineage.catalogue import scan
from snaketron.lineage.record import FOOTER, of_user
from snaketron.lineage.uses import source
from snaketron.log import UserError
from snaketron.settings.blends import BlendSettings
from snaketron.settings.chats import PackSettings

import numpy as np
import pyarrow.parquet as pq
import pytest

# Tokens of each conversation, its raw row and split. Packs have room for 8 tokens.
CONVERSATIONS = [
    (8, 1, "train"),
    (5, 2, "train"),
    (3, 3, "train"),
    (4, 4, "valid"),
    (9, 5, "train"),
    (7, 6, "train"),
]
# First fit of the longest first: 8 | 7 | 5 + 3. What has 9 tokens is dropped.
PACKS = {1: 0, 6: 1, 2: 2, 3: 2}


@pytest.fixture
def trained(work: Path, record: Callable[..., Path], train: Callable[..., Path]) -> Path:
    """A rendered and packed file, a blend of it, and SFT on it: 4 steps of 2 packs."""
    raw = Path("raw/chats.jsonl")
    raw.parent.mkdir()
    raw.write_text("{}\n" * 6, encoding="utf-8")
    rendered = Path("data/chat/talk/chats.parquet")
    rendered.parent.mkdir(parents=True)
    made_with = {"source": "talk", "tokenizer_sha256": "t", "template_sha256": "t"}
    schema = SCHEMA.with_metadata({FOOTER: json.dumps(made_with).encode()})
    sequences = [
        Sequence(np.arange(row * 10, row * 10 + n), np.ones(n, np.uint8), str(raw), row, 0, split, "none", [])
        for n, row, split in CONVERSATIONS
    ]
    pq.write_table(table(sequences, schema), rendered)
    counts = {"dropped_rows": [{"file": str(raw), "row": 7, "reason": "bad row", "detail": "no messages"}]}
    counts |= {"rows": 7, "dropped": {"bad row": 1}}
    inputs, outputs = {"chats": [of_user(raw)]}, {"chats.parquet": str(rendered)}
    place = "data/chat/talk/chats.json"
    record("render_chat", "talk/chats", place, inputs, outputs, {"messages_field": "messages"}, counts)
    splits = {split: Path(f"data/sft/{split}/talk/chats.parquet") for split in ("train", "valid", "test")}
    pack.pack_chats(
        [rendered],
        settings=PackSettings(pack_size=8, algorithm="first_fit_decreasing"),
        max_dropped_fraction=1.0,
        outputs=splits,
        record=Path("data/sft/talk/chats.json"),
    )
    place = Path("data/sft/blend.json")
    settings = BlendSettings(weights={"talk": 1.0})
    blend.build(settings, [Path("data/sft/talk/chats.json")], place, Path("data/sft/record.json"))
    train("sft", "0a", str(place))
    return work


def look(*rows: int) -> list[Fate]:
    catalogue = scan(Path.cwd())
    return fates(catalogue, source(catalogue, "raw/chats.jsonl"), rows)


def steps_of(pack: int, seed: int = 7, samples: int = 8) -> list[int]:
    """By the rule of mixing.walk: a new permutation of the 3 packs in each epoch, two packs a step."""
    epochs = (np.random.SeedSequence(seed, spawn_key=(0, epoch)) for epoch in range(3))
    walked = np.concatenate([np.random.default_rng(seeds).permutation(3) for seeds in epochs])[:samples]
    return sorted({int(place) // 2 + 1 for place in np.flatnonzero(walked == pack)})


def test_each_conversation_is_trained_on_when_its_pack_is(trained: Path):
    found = look(*PACKS)
    assert [fate.row for fate in found] == list(PACKS)
    for fate in found:
        (training,) = fate.trainings
        assert (training.made.version, training.num_steps) == ("sft-0a", 4)
        assert training.steps == steps_of(PACKS[fate.row]) != []


def test_packs_that_were_registered_are_trained_on_there_too(trained: Path, record, train):
    """A training on registered packs was left out, and a removal said that it saw none of the document."""
    packed, registered = Path("data/sft/train/talk/chats.parquet"), Path("other/train/talk.parquet")
    registered.parent.mkdir(parents=True)
    pq.write_table(pq.read_table(packed), registered, compression="none")
    made, inputs = {"train": str(registered)}, {"packs": [of_user(packed)]}
    packs = record("registered_packs", "help/talk", "other/talk.json", inputs, made)
    source = {"source": "help", "weight": 1.0, "files": [{"path": str(registered), "packs": 3}]}
    blended = Path("other/blend.json")
    blended.write_text(json.dumps({"splits": {"train": [source]}}), encoding="utf-8")
    record("blend_sft", "sft", "other/record.json", {"records": [packs]}, {"blend.json": str(blended)})
    train("sft", "0e", str(blended), seed=8)
    for fate in look(*PACKS):
        here, there = fate.trainings
        assert (here.made.version, here.steps) == ("sft-0a", steps_of(PACKS[fate.row]))
        assert (there.made.version, there.steps) == ("sft-0e", steps_of(PACKS[fate.row], seed=8))


def test_what_is_in_no_pack_says_why(trained: Path):
    held_out, long, dropped = look(4, 5, 7)
    assert (held_out.splits, held_out.why) == (["valid"], "held out for validation")
    assert long.why == "in no pack: longer than a pack (9 tokens, pack_size 8)" and not long.trained
    assert dropped.why == "dropped: bad row: no messages"


def test_packs_of_another_version_are_not_trusted(trained: Path):
    packed = Path("data/sft/train/talk/chats.parquet")
    pq.write_table(pq.read_table(packed).take([1, 0, 2]), packed)
    with pytest.raises(
        UserError, match=r"pack 0 does not hold the conversation; another version of the code"
    ):
        look(1)


def test_a_source_of_several_files_numbers_its_packs_through():
    files = [{"path": "one", "packs": 2}, {"path": "two", "packs": 1}]
    value = {"splits": {"train": [{"source": "talk", "weight": 1.0, "files": files}]}}
    order = PackOrder(value, 8, 7)
    by_pack = [order.samples([pack]).tolist() for pack in (("one", 0), ("one", 1), ("two", 0))]
    assert sorted(k for samples in by_pack for k in samples) == list(range(8))
    assert [sorted({k // 2 + 1 for k in samples}) for samples in by_pack] == [steps_of(n) for n in range(3)]

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pack_sft
from snaketron.data import arrow
from snaketron.data.chats import pack as pack_module
from snaketron.data.chats.packs import SCHEMA as PACKS
from snaketron.data.chats.packs import PackedDataset
from snaketron.data.chats.sequences import SCHEMA
from snaketron.lineage.record import FOOTER, Record, read
from snaketron.log import UserError
from snaketron.settings.chats import PackSettings
from tests.unit.data.conftest import slow_imports

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

METADATA = {"source": "questions", "tokenizer_sha256": "t", "template_sha256": "c"}


def write_chats(path: Path, chats: list[tuple[list[int], list[int], str]]) -> Path:
    """Rendered chats of (ids, mask, split)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "input_ids": [ids for ids, _, _ in chats],
            "loss_mask": [mask for _, mask, _ in chats],
            "file": ["raw.jsonl"] * len(chats),
            "row": list(range(1, len(chats) + 1)),
            "turn": [0] * len(chats),
            "split": [split for _, _, split in chats],
            "reasoning_mode": ["none"] * len(chats),
        }
    ).cast(SCHEMA)
    schema = SCHEMA.with_metadata({FOOTER: json.dumps(METADATA).encode()})
    pq.write_table(table.cast(schema), path, row_group_size=40)
    return path


def arguments(tmp_path: Path, *chats: Path, **options: Any) -> list[str]:
    """The command line of pack_sft; options that say how it packs go into its settings."""
    settings = {"pack_size": 8, "algorithm": "first_fit_decreasing"}
    settings |= {name: options.pop(name) for name in PackSettings.model_fields if name in options}
    values = {
        "settings": PackSettings(**settings).model_dump_json(),
        "train": tmp_path / "sft/train/questions/part_0.parquet",
        "valid": tmp_path / "sft/valid/questions/part_0.parquet",
        "test": tmp_path / "sft/test/questions/part_0.parquet",
        "record": tmp_path / "sft/questions/part_0.json",
    } | options
    given = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    chats = chats or (tmp_path / "chat/questions/part_0.parquet",)
    return ["--chats", *map(str, chats), *given]


def pack(tmp_path: Path, chats: list[tuple[list[int], list[int], str]], **options: Any) -> Record:
    write_chats(tmp_path / "chat/questions/part_0.parquet", chats)
    assert pack_sft.main(arguments(tmp_path, **options)) == 0
    return read(tmp_path / "sft/questions/part_0.json")


def packs(tmp_path: Path, split: str = "train") -> list[dict[str, Any]]:
    return pq.read_table(tmp_path / f"sft/{split}/questions/part_0.parquet").to_pylist()


CHATS = [
    ([10, 11, 12], [0, 1, 1], "train"),
    ([20, 21, 22, 23, 24, 25], [0, 0, 0, 0, 1, 1], "train"),
    ([30, 31], [0, 1], "train"),
    ([40, 41, 42], [0, 0, 1], "valid"),
    (list(range(50, 59)), [1] * 9, "train"),  # 9 tokens, a pack has 8
    ([60, 61], [1, 0], "train"),  # nothing predicts the first token
]


def test_conversations_are_packed_whole_with_masks_aligned_to_labels(tmp_path):
    pack(tmp_path, CHATS)
    assert packs(tmp_path) == [
        {
            "input_ids": [20, 21, 22, 23, 24, 25, 30, 31],
            "loss_mask": [0, 0, 0, 1, 1, 0, 1, 0],
            "seq_start_id": [0, 6],
        },
        {"input_ids": [10, 11, 12], "loss_mask": [1, 1, 0], "seq_start_id": [0]},
    ]
    assert packs(tmp_path, "valid") == [
        {"input_ids": [40, 41, 42], "loss_mask": [0, 1, 0], "seq_start_id": [0]}
    ]
    assert packs(tmp_path, "test") == []


def test_everything_is_counted(tmp_path):
    counts = pack(tmp_path, CHATS).counts["splits"]
    assert counts["train"] == {
        "conversations": 5,
        "packed": 3,
        "dropped": {"longer than a pack": 1, "nothing to train on": 1},
        "cut": 0,
        "cut_tokens": 0,
        "packs": 2,
        "tokens": 11,
        "trained_tokens": 5,
        "efficiency": 0.6875,  # 11 of 2 x 8
        "length_histogram": {"2": 2, "4": 1},  # 3 and 2, 6
    }
    assert counts["valid"]["trained_tokens"] == 1
    assert counts["test"] == {
        "conversations": 0,
        "packed": 0,
        "dropped": {},
        "cut": 0,
        "cut_tokens": 0,
        "packs": 0,
        "tokens": 0,
        "trained_tokens": 0,
        "efficiency": 0.0,
        "length_histogram": {},
    }


LONG = [
    # The second answer does not fit; nor does the only one of the next; that of the last ends at the border.
    ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 1, 1, 0, 0, 1, 1, 1, 1, 0], "train"),
    ([11, 12, 13, 14, 15, 16, 17, 18, 19], [0, 0, 0, 0, 0, 0, 0, 1, 1], "train"),
    ([21, 22, 23, 24, 25, 26, 27, 28, 29], [0, 0, 0, 0, 0, 0, 1, 1, 0], "train"),
]


def test_the_sizes_that_all_conversations_need_are_counted(tmp_path):
    """Conversations of 3, 6, 2, 3, 9 and 2 tokens, in all splits, and those left out too."""
    assert pack(tmp_path, CHATS).counts["needed_pack_size"] == {"2": 2, "4": 2, "8": 1, "16": 1}
    numbers = np.array([1, 2, 3, 4, 5, 8, 1024, 1025])
    assert pack_module.smallest_packs(numbers) == {"1": 1, "2": 1, "4": 2, "8": 2, "1024": 1, "2048": 1}


def test_what_no_pack_takes_is_said_and_too_much_of_it_refused(tmp_path, caplog):
    """2 of 6 are left out, one of them because it is too long: 33 %."""
    said = (
        "questions/part_0: 2 of 6 conversations are left out (1 longer than a pack, 1 nothing to train on); "
        "packs of 16 tokens keep 100.0%"
    )
    caplog.set_level("INFO")
    pack(tmp_path, CHATS, max_dropped_fraction=0.34)
    assert [(line.levelname, line.message) for line in caplog.records if "left out" in line.message] == [
        ("INFO", said)  # in the job's log; blend_sft warns of all shards together
    ]
    for path in (tmp_path / "sft").rglob("*.*"):
        path.unlink()
    with pytest.raises(UserError) as error:
        pack(tmp_path, CHATS, max_dropped_fraction=0.33)
    assert str(error.value) == (
        f"{said}. That is more than sft_data.max_dropped_fraction 0.33 allows: raise sft_data.pack_size, let "
        "sft_data.long_conversations cut them, or allow more"
    )
    assert [path for path in (tmp_path / "sft").rglob("*") if path.is_file()] == []


def test_nothing_is_said_where_all_are_packed(tmp_path, caplog):
    pack(tmp_path, CHATS[:4], max_dropped_fraction=0.0)
    assert "left out" not in caplog.text


def test_a_long_conversation_is_dropped(tmp_path):
    assert pack(tmp_path, LONG).counts["splits"]["train"]["dropped"] == {"longer than a pack": 3}
    assert packs(tmp_path) == []


def test_a_long_conversation_is_cut_after_an_answer(tmp_path):
    counts = pack(tmp_path, LONG, long_conversations="cut_at_answer").counts["splits"]["train"]
    assert sorted(row["input_ids"] for row in packs(tmp_path)) == [
        [1, 2, 3],
        [21, 22, 23, 24, 25, 26, 27, 28],
    ]
    assert sorted(row["loss_mask"] for row in packs(tmp_path)) == [[0, 0, 0, 0, 0, 1, 1, 0], [1, 1, 0]]
    assert (counts["cut"], counts["cut_tokens"], counts["trained_tokens"]) == (2, 7 + 1, 2 + 2)
    assert counts["dropped"] == {"longer than a pack, which no answer fits in": 1}


def test_an_unfinished_answer_is_not_trained(tmp_path):
    counts = pack(tmp_path, LONG, long_conversations="cut_unfinished").counts["splits"]["train"]
    rows = sorted((row["input_ids"], row["loss_mask"]) for row in packs(tmp_path))
    assert rows == [
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 0, 0, 0, 0, 0, 0]),
        ([21, 22, 23, 24, 25, 26, 27, 28], [0, 0, 0, 0, 0, 1, 1, 0]),
    ]
    assert (counts["cut"], counts["cut_tokens"], counts["trained_tokens"]) == (2, 2 + 1, 2 + 2)
    assert counts["dropped"] == {"longer than a pack, which no answer fits in": 1}


def test_packs_leave_room_for_padding(tmp_path):
    """To multiples of 4, conversations of 3, 6 and 2 tokens take 4, 8 and 4 of the 8."""
    record = pack(tmp_path, CHATS, padding_multiple=4)
    assert sorted(row["seq_start_id"] for row in packs(tmp_path)) == [[0], [0, 3]]
    assert sorted(len(row["input_ids"]) for row in packs(tmp_path)) == [5, 6]
    assert record.settings["padding_multiple"] == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"padding_multiple": 3}, "padding_multiple 3 does not divide pack_size 8"),
        ({"algorithm": "best"}, "Input should be 'first_fit_decreasing', 'first_fit_shuffle' or "),
    ],
)
def test_settings_by_which_nothing_can_be_packed_are_refused(keys: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        PackSettings(**{"pack_size": 8, "algorithm": "concatenative"} | keys)


def test_packs_of_many_thousand_tokens_hold_what_was_rendered(tmp_path):
    """Packs of 256K tokens, from conversations of up to 200K."""
    lengths = [200_000, 62_000, 150_000, 90_000, 20_000, 5]
    chats = [([i + 1] * n, [0] + [1] * (n - 1), "train") for i, n in enumerate(lengths)]
    counts = pack(tmp_path, chats, pack_size=262_144, padding_multiple=16).counts["splits"]["train"]
    assert (counts["packs"], counts["tokens"], counts["trained_tokens"]) == (
        2,
        sum(lengths),
        sum(lengths) - 6,
    )
    rows = PackedDataset([tmp_path / "sft/train/questions/part_0.parquet"], {"pack_size": 262_144})
    found = {}
    for row in (rows[0], rows[1]):
        for start, length in zip(row.seq_start_id.tolist(), row.lengths.tolist(), strict=True):
            (number,) = set(row.input_ids[start : start + length].tolist())
            found[number] = length
            assert row.loss_mask[start : start + length].sum() == length - 1
    assert found == {i + 1: n for i, n in enumerate(lengths)}


def test_the_other_algorithm_keeps_the_order(tmp_path):
    pack(tmp_path, CHATS, algorithm="concatenative")
    assert [row["input_ids"] for row in packs(tmp_path)] == [[10, 11, 12], [20, 21, 22, 23, 24, 25, 30, 31]]


def test_the_footer_says_what_the_packs_are_for(tmp_path):
    record = pack(tmp_path, CHATS)
    path = tmp_path / "sft/train/questions/part_0.parquet"
    made_for = {**METADATA, "pack_size": 8, "algorithm": "first_fit_decreasing", "padding_multiple": 1}
    made_for["long_conversations"] = "drop"
    _, metadata = arrow.read_footer(path, PACKS.names)
    assert metadata == {**made_for, "split": "train", "counts": record.counts["splits"]["train"]}
    assert record.settings == made_for and record.name == "questions/part_0"
    assert len(PackedDataset([path], made_for)) == 2


def many_chats() -> list[tuple[list[int], list[int], str]]:
    """500 conversations of 2 to 59 tokens, of which each is the number of the conversation."""
    lengths = np.random.default_rng(0).integers(2, 60, size=500).tolist()
    return [([i] * n, [0] + [1] * (n - 1), ("train", "valid", "test")[i % 3]) for i, n in enumerate(lengths)]


def pack_parts(tmp_path: Path, num_parts: int, **options: Any) -> dict[str, Any]:
    """Pack the many conversations from several files; returns the record."""
    chats, size = many_chats(), 500 // num_parts
    parts = [
        write_chats(tmp_path / f"chat/questions/part_{i}.parquet", chats[i * size : (i + 1) * size])
        for i in range(num_parts)
    ]
    options = {"pack_size": 64, "record": tmp_path / "sft/questions/all.json"} | options
    assert pack_sft.main(arguments(tmp_path, *parts, **options)) == 0
    return read(tmp_path / "sft/questions/all.json")


def test_conversations_of_several_files_share_packs(tmp_path):
    pack(tmp_path, many_chats(), pack_size=64)
    alone = {split: packs(tmp_path, split) for split in ("train", "valid", "test")}
    record = pack_parts(tmp_path, 5)
    assert {split: packs(tmp_path, split) for split in alone} == alone
    assert record.name == "questions/all"
    assert [Path(entry.path).stem for entry in record.inputs] == [f"part_{i}" for i in range(5)]


@pytest.mark.parametrize("pass_tokens", [1, 300])
def test_what_fits_in_memory_does_not_change_the_bytes(tmp_path, monkeypatch, pass_tokens):
    def run() -> list[bytes]:
        pack_parts(tmp_path, 5)
        return [path.read_bytes() for path in sorted(tmp_path.glob("sft/*/questions/*.parquet"))]

    expected = run()
    monkeypatch.setattr(pack_module, "PASS_TOKENS", pass_tokens)
    assert run() == expected


def test_a_pass_holds_no_more_tokens_than_it_may(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "PASS_TOKENS", 300)
    sizes = []
    collect = pack_module.Conversations.tokens

    def tokens(chats: Any, wanted: np.ndarray) -> Any:
        collected = collect(chats, wanted)
        sizes.append(len(collected[0]))
        return collected

    monkeypatch.setattr(pack_module.Conversations, "tokens", tokens)
    record = pack_parts(tmp_path, 5)
    total = sum(counts["tokens"] for counts in record.counts["splits"].values())
    assert sum(sizes) == total and max(sizes) <= 300 and len(sizes) < total / 200


def test_the_seed_matters_to_the_shuffle_only(tmp_path):
    shuffled = pack_parts(tmp_path, 5, algorithm="first_fit_shuffle", seed=1)
    first = packs(tmp_path)
    assert shuffled.settings["seed"] == 1
    pack_parts(tmp_path, 5, algorithm="first_fit_shuffle", seed=2)
    assert packs(tmp_path) != first
    assert "seed" not in pack_parts(tmp_path, 5).settings


def test_nothing_is_lost_among_many_conversations(tmp_path):
    chats = many_chats()
    lengths = [len(ids) for ids, _, _ in chats]
    record = pack(tmp_path, chats, pack_size=64)
    seen: dict[int, int] = {}
    for split in ("train", "valid", "test"):
        for row in packs(tmp_path, split):
            assert len(row["input_ids"]) == len(row["loss_mask"]) <= 64
            ends = [*row["seq_start_id"][1:], len(row["input_ids"])]
            for start, end in zip(row["seq_start_id"], ends, strict=True):
                (item,) = set(row["input_ids"][start:end])
                assert row["loss_mask"][start:end] == [1] * (end - start - 1) + [0]
                seen[item] = end - start
    assert seen == dict(enumerate(lengths))
    for split, counts in record.counts["splits"].items():
        fewest = sum(len(ids) for ids, _, of in chats if of == split) / 64
        assert counts["packs"] <= 1.1 * fewest


def test_an_empty_file_gives_empty_splits(tmp_path):
    record = pack(tmp_path, [])
    assert [counts["packs"] for counts in record.counts["splits"].values()] == [0, 0, 0]


def refused(tmp_path: Path, *chats: Path) -> str:
    with pytest.raises(UserError) as caught:
        pack_sft.main(arguments(tmp_path, *chats))
    assert not [path for path in tmp_path.glob("sft/**/*") if path.is_file()]
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_truncated_file_is_an_error(tmp_path):
    path = write_chats(tmp_path / "chat/questions/part_0.parquet", CHATS)
    path.write_bytes(path.read_bytes()[:-20])
    assert refused(tmp_path).startswith("chat/questions/part_0.parquet: damaged or not Parquet")


def test_another_kind_of_file_is_an_error(tmp_path):
    (tmp_path / "chat/questions").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "chat/questions/part_0.parquet")
    assert "column input_ids, loss_mask, file, row, turn, split, reasoning_mode is missing" in refused(
        tmp_path
    )


def test_files_of_different_sources_are_not_packed_together(tmp_path, monkeypatch):
    first = write_chats(tmp_path / "chat/questions/part_0.parquet", CHATS)
    monkeypatch.setitem(METADATA, "source", "tools")
    second = write_chats(tmp_path / "chat/tools/part_0.parquet", CHATS)
    message = refused(tmp_path, first, second)
    assert message.startswith(
        "chat/tools/part_0.parquet: was made with source tools, and questions is wanted"
    )


def test_a_file_that_is_given_twice_is_an_error(tmp_path):
    path = write_chats(tmp_path / "chat/questions/part_0.parquet", CHATS)
    assert refused(tmp_path, path, path).startswith("chat/questions/part_0.parquet: is given twice")


def test_a_missing_file_is_an_error(tmp_path):
    assert refused(tmp_path).startswith("chat/questions/part_0.parquet: no such file")


def test_the_job_does_not_import_what_is_slow(tmp_path):
    write_chats(tmp_path / "chat/questions/part_0.parquet", CHATS)
    assert not slow_imports("pack_sft", *arguments(tmp_path))

"""Packs from elsewhere: written again as pack_sft writes them when they are sound, and refused otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from snaketron.data.chats import packs
from snaketron.data.chats.blend import build, check_packed_blend
from snaketron.data.chats.register import fault
from snaketron.files import sha256
from snaketron.lineage.record import making, read
from snaketron.settings.blends import BlendSettings
from snaketron.settings.registering import RegisterPacksSettings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SETTINGS = RegisterPacksSettings(source="help", split="train", pack_size=8)
ROW = {"input_ids": [1, 2, 3, 4, 5], "loss_mask": [0, 1, 0, 1, 0], "seq_start_id": [0, 3]}


def write(path: Path, rows: list[dict[str, list[int]]], **types: pa.DataType) -> Path:
    """Write packs like Megatron-Bridge: int8 masks, and no footer that says what made them."""
    kinds = {"input_ids": pa.int32(), "loss_mask": pa.int8(), "seq_start_id": pa.int32()} | types
    if kinds["loss_mask"] == pa.bool_():
        rows = [row | {"loss_mask": list(map(bool, row["loss_mask"]))} for row in rows]
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


@pytest.fixture
def register(run_script, tmp_path: Path, tokenizer_dir: Path) -> Callable[..., tuple[int, str, Path]]:
    """Run register_packs; returns exit status, standard error and the path of the record."""

    def run(file: Path, **settings: Any) -> tuple[int, str, Path]:
        root, given = tmp_path / "data/sft", SETTINGS.model_copy(update=settings)
        record = root / given.source / f"{given.split}.{file.stem}.json"
        status, stderr = run_script(
            "register_packs",
            *("--packs", file, "--settings", given.model_dump_json(), "--tokenizer", tokenizer_dir),
            *(
                word
                for split in ("train", "valid", "test")
                for word in (f"--{split}", root / split / given.source / f"{record.stem}.parquet")
            ),
            *("--record", record),
        )
        return status, stderr, record

    return run


def made(register: Callable[..., tuple[int, str, Path]], file: Path, **settings: Any) -> Path:
    status, stderr, record = register(file, **settings)
    assert status == 0, stderr
    return record


def refused(register: Callable[..., tuple[int, str, Path]], file: Path, **settings: Any) -> str:
    status, stderr, record = register(file, **settings)
    assert status == 1
    assert not [path for path in record.parents[1].rglob(f"*/{record.parent.name}/*") if path.is_file()]
    assert not list(record.parent.glob("*"))
    return stderr


@pytest.mark.parametrize(
    "types",
    [{}, {"loss_mask": pa.bool_()}, {"input_ids": pa.int64(), "loss_mask": pa.uint8()}],
    ids=["bridge", "bool", "nemotron"],
)
def test_packs_of_other_programs_are_written_as_our_own(register, tmp_path, tokenizer_dir, types):
    record = read(made(register, write(tmp_path / "store/a.parquet", [ROW, ROW], **types)))
    counts = record.counts["splits"]["train"]
    assert (counts["packs"], counts["packed"], counts["tokens"], counts["trained_tokens"]) == (2, 4, 10, 4)
    assert (counts["efficiency"], counts["length_histogram"]) == (0.625, {"2": 4})
    assert record.counts["splits"]["valid"]["packs"] == 0
    expected = {"tokenizer_sha256": sha256(tokenizer_dir / "tokenizer.json"), "pack_size": 8}
    dataset = packs.PackedDataset([record.output(s).file for s in ("train", "valid")], expected)
    assert len(dataset) == 2
    assert [column.tolist() for column in dataset[1]] == list(ROW.values())
    (given,) = record.inputs_named("packs")
    assert (given.path, given.sha256) == (
        f"{tmp_path}/store/a.parquet",
        sha256(tmp_path / "store/a.parquet"),
    )
    assert not record.settings["tokenizer_known"]


def test_a_blend_takes_registered_and_packed_shards_alike(register, tmp_path: Path, tokenizer_dir: Path):
    """The algorithm that packed elsewhere does not matter to a training, as the size and the tokenizer do."""
    elsewhere = made(register, write(tmp_path / "store/a.parquet", [ROW]))
    identity = sha256(tokenizer_dir / "tokenizer.json")
    settings = {"source": "own", "tokenizer_sha256": identity, "template_sha256": "t", "pack_size": 8}
    settings |= {"algorithm": "concatenative", "padding_multiple": 1}
    outputs = {split: tmp_path / f"data/sft/{split}/own/a.parquet" for split in ("train", "valid", "test")}
    own = tmp_path / "data/sft/own/a.json"
    with making("pack_sft", "own/a", outputs=outputs, record=own) as job:
        counts = {"packs": 1, "tokens": 5, "trained_tokens": 2, "conversations": 1, "dropped": {}}
        for path in job.aside.values():
            packs.write(path, [packs.Pack(*map(np.array, ROW.values()))], settings)
        job.settings = settings
        job.counts = {"splits": dict.fromkeys(outputs, counts), "needed_pack_size": {"8": 3}}
    blend = tmp_path / "data/sft/blend.json"
    weights = BlendSettings(weights={"help": 3, "own": 1})
    build(weights, [elsewhere, own], blend, tmp_path / "data/sft/record.json")
    loaded = check_packed_blend(blend, tokenizer_sha256=identity, pack_size=8, algorithm="concatenative")
    assert [(s.source, s.weight) for s in loaded.splits["train"]] == [("help", 0.75), ("own", 0.25)]
    assert [s.source for s in loaded.splits["valid"]] == ["own"]


def test_packs_of_this_workflow_say_what_they_were_made_for(register, tmp_path: Path, tokenizer_dir: Path):
    identity = sha256(tokenizer_dir / "tokenizer.json")
    footer = {"tokenizer_sha256": identity, "template_sha256": "t", "pack_size": 8, "split": "train"}
    pack = packs.Pack(*map(np.array, ROW.values()))
    packs.write(tmp_path / "own.parquet", [pack], footer | {"algorithm": "concatenative"})
    settings = read(made(register, tmp_path / "own.parquet")).settings
    assert (settings["template_sha256"], settings["tokenizer_known"]) == ("t", True)
    packs.write(
        tmp_path / "other.parquet", [pack], {"tokenizer_sha256": "x", "pack_size": 9, "split": "test"}
    )
    said = refused(register, tmp_path / "other.parquet", source="other", tokenizer_sha256="ab" * 32)
    assert "was made with pack_size 9, where 8 is wanted; set sft_data.pack_size to it" in said
    assert "was made with split test, where train is wanted; name them there" in said
    assert f"was made with tokenizer_sha256 x, where {identity} is wanted" in said
    assert f"made with a tokenizer.json of sha256 {'ab' * 32}" in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss_mask": [0, 1, 0]}, "5 ids and a mask of 3"),
        ({"input_ids": [], "loss_mask": []}, "0 ids and a mask of 0"),
        (
            {"seq_start_id": [0, 3, 3]},
            "seq_start_id must rise from 0 and stay below 5 tokens, and is [0, 3, 3]",
        ),
        ({"seq_start_id": [1]}, "and is [1]"),
        ({"seq_start_id": [0, 5]}, "and is [0, 5]"),
        ({"seq_start_id": []}, "and is []"),
        ({"input_ids": [1, 2, 3, 4, 300]}, "id 300, where the vocabulary has 0 to 299"),
        ({"input_ids": [1, 2, -3, 4, 5]}, "id -3, where the vocabulary has 0 to 299"),
        ({"loss_mask": [0, 2, 0, 1, 0]}, "loss_mask holds 2, where it has 0 and 1"),
        ({"loss_mask": [0, 1, 1, 1, 0]}, "its label is in another conversation"),
        (
            {"input_ids": [1] * 9, "loss_mask": [0] * 9},
            "9 tokens, where a pack has at most sft_data.pack_size 8",
        ),
    ],
)
def test_a_pack_that_cannot_be_trained_on_is_named(changed: dict[str, list[int]], said: str):
    pack = packs.Pack(*(np.array(column, dtype=np.int32) for column in (ROW | changed).values()))
    assert said in (fault(pack, SETTINGS, 300) or "")
    assert fault(packs.Pack(*map(np.array, ROW.values())), SETTINGS, 300) is None


def test_packs_need_room_for_the_padding_of_context_parallelism():
    """3 and 2 tokens padded to 4 each are 8; padded to 8 they are 16."""
    pack = packs.Pack(*map(np.array, ROW.values()))
    settings = [SETTINGS.model_copy(update={"padding_multiple": multiple}) for multiple in (4, 8)]
    assert fault(pack, settings[0], 300) is None
    assert (
        fault(pack, settings[1], 300) == "16 tokens once each conversation is padded to 8, where a pack has 8"
    )


def test_the_first_faults_of_a_file_are_listed_and_the_others_counted(register, tmp_path: Path):
    rows = [ROW, *[ROW | {"input_ids": [1, 2, 3, 4, 300 + i]} for i in range(12)]]
    said = refused(register, write(tmp_path / "store/a.parquet", rows))
    assert "row 1: id 300" in said and "row 10: id 309" in said and "and 2 more rows" in said
    assert "row 0" not in said and "row 11" not in said


def test_a_file_on_which_nothing_is_trained_is_refused(register, tmp_path: Path):
    file = write(tmp_path / "store/a.parquet", [ROW | {"loss_mask": [0] * 5}])
    assert "none of the tokens in its 1 pack is trained" in refused(register, file)


def test_damaged_files_and_those_of_other_kinds_are_refused(register, tmp_path: Path):
    sound = write(tmp_path / "store/a.parquet", [ROW] * 100)
    whole = sound.read_bytes()
    sound.write_bytes(whole[:-100])
    assert "a.parquet: damaged or not Parquet" in refused(register, sound)
    sound.write_bytes(whole[:40] + bytes(40) + whole[80:])
    assert "a.parquet: cannot be read, or holds other numbers than packs do" in refused(register, sound)
    other = write(tmp_path / "store/b.parquet", [ROW], loss_mask=pa.float32())
    assert "column loss_mask is list<element: float>, where packs have lists of integers" in refused(
        register, other
    )
    assert "store/c.parquet: no such file" in refused(register, tmp_path / "store/c.parquet")
    huge = write(
        tmp_path / "store/d.parquet", [ROW | {"input_ids": [1, 2, 3, 4, 1 << 40]}], input_ids=pa.int64()
    )
    assert "holds other numbers than packs do" in refused(register, huge)
    holes = write(tmp_path / "store/e.parquet", [ROW | {"loss_mask": [0, 1, None, 1, 0]}])
    assert "null in place of a number" in refused(register, holes)

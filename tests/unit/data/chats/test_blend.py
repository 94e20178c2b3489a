from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import blend_sft as script
from snaketron import files
from snaketron.data.chats.blend import check_packed_blend
from snaketron.data.chats.packs import Pack, join, write
from snaketron.lineage.record import making, of_file, read
from snaketron.log import UserError
from snaketron.settings.blends import BlendSettings

import numpy as np
import pytest

SETTINGS = {
    "tokenizer_sha256": "t",
    "template_sha256": "c",
    "pack_size": 8,
    "algorithm": "concatenative",
    "padding_multiple": 1,
}


def shard(
    root: Path,
    source: str,
    number: int,
    *,
    train: int = 2,
    valid: int = 1,
    test: int = 1,
    of_train: dict[str, Any] | None = None,
    chats: Path | None = None,
    **other: Any,
) -> Path:
    """A packed shard, as rule pack_sft leaves it: so many packs of 4 tokens, 2 of them trained."""
    settings = {"source": source, **SETTINGS, **other}
    counts, outputs = {}, {}
    for split, packs in (("train", train), ("valid", valid), ("test", test)):
        path = root / f"sft/{split}/{source}/part_{number}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pack: Pack = join([(np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], dtype=np.uint8))])
        write(path, [pack] * packs, settings)
        counts[split] = {"packs": packs, "tokens": 4 * packs, "trained_tokens": 2 * packs}
        counts[split] |= {"conversations": packs, "dropped": {}}
        outputs[split] = path
    record = root / f"sft/{source}/part_{number}.json"
    with making("pack_sft", f"{source}/part_{number}", outputs={}, record=record) as job:
        job.present = [of_file(split, path) for split, path in outputs.items()]
        counts["train"] |= of_train or {}
        job.settings, job.inputs = settings, {"chats": [chats] if chats else []}
        job.counts = {"splits": counts, "needed_pack_size": {"4": 4, **({"16": 2} if of_train else {})}}
    return record


def arguments(root: Path, records: list[Path], *weights: str, **splits: str) -> list[str]:
    options = ["--output", str(root / "sft/blend.json"), "--record", str(root / "sft/record.json")]
    settings = BlendSettings(weights=dict(weight.split("=") for weight in weights), splits=splits)
    return ["--settings", settings.model_dump_json(), "--records", *map(str, records), *options]


def blend(root: Path, records: list[Path], *weights: str, **splits: str) -> dict[str, Any]:
    assert script.main(arguments(root, records, *weights, **splits)) == 0
    return files.read_json(root / "sft/blend.json")


def refused(root: Path, records: list[Path], *weights: str, **splits: str) -> str:
    with pytest.raises(UserError) as caught:
        script.main(arguments(root, records, *weights, **splits))
    assert not (root / "sft/blend.json").exists() and not (root / "sft/record.json").exists()
    return str(caught.value).replace(f"{root}/", "")


def test_a_blend_lists_weights_and_files_of_each_split(tmp_path):
    records = [
        shard(tmp_path, "questions", 0),
        shard(tmp_path, "questions", 1, train=3),
        shard(tmp_path, "tools", 0),
    ]
    value = blend(tmp_path, records, "questions=3", "tools=1")
    shared = {name: SETTINGS[name] for name in SETTINGS if name != "template_sha256"}
    assert {name: value[name] for name in shared} == shared
    assert value["efficiency"] == 0.5  # 4 tokens in packs of 8
    questions, tools = value["splits"]["train"]
    assert (questions["source"], questions["weight"]) == ("questions", 0.75)
    assert (tools["source"], tools["weight"]) == ("tools", 0.25)
    assert questions["template_sha256"] == "c"
    assert (questions["packs"], questions["tokens"], questions["trained_tokens"]) == (5, 20, 10)
    path = tmp_path / "sft/train/questions/part_1.parquet"
    assert questions["files"][1] == {
        "path": str(path),
        "packs": 3,
        "tokens": 12,
        "trained_tokens": 6,
        "bytes": path.stat().st_size,
        "sha256": files.sha256(path),
    }
    record = read(tmp_path / "sft/record.json")
    assert record.counts["train"] == {"packs": 7, "tokens": 28, "trained_tokens": 14}
    assert [entry.path for entry in record.inputs] == [str(path) for path in records]


def test_a_source_without_validation_packs_is_left_out_there_with_a_note(tmp_path, caplog):
    records = [shard(tmp_path, "questions", 0), shard(tmp_path, "tools", 0, valid=0, test=0)]
    with caplog.at_level(logging.WARNING):
        value = blend(tmp_path, records, "questions=0.5", "tools=0.5")
    assert [(s["source"], s["weight"]) for s in value["splits"]["valid"]] == [("questions", 1.0)]
    assert "valid: source 'tools' has no packs and is left out" in caplog.text


def test_a_source_that_is_held_out_takes_no_share_of_the_training(tmp_path, caplog):
    """Its weight counts among what is validated. Nobody is warned that it has nothing in the other splits."""
    records = [
        shard(tmp_path, "questions", 0),
        shard(tmp_path, "tools", 0, valid=0, test=0),
        shard(tmp_path, "mine", 0, train=0, valid=3, test=0),
    ]
    with caplog.at_level(logging.WARNING):
        value = blend(tmp_path, records, "questions=0.5", "tools=0.5", "mine=1", mine="valid", tools="train")
    shares = {split: [(s["source"], s["weight"]) for s in found] for split, found in value["splits"].items()}
    assert shares == {
        "train": [("questions", 0.5), ("tools", 0.5)],
        "valid": [("questions", 0.5 / 1.5), ("mine", 1 / 1.5)],
        "test": [("questions", 1.0)],
    }
    assert "is left out" not in caplog.text


def test_a_source_that_is_held_out_has_packs_in_its_split_and_in_no_other(tmp_path):
    questions, mine = shard(tmp_path, "questions", 0), shard(tmp_path, "mine", 0)
    said = refused(tmp_path, [questions, mine], "questions=1", "mine=1", mine="valid")
    assert said.startswith(
        "sft/train/mine/part_0.parquet: source 'mine' is of split valid; remove its record"
    )
    none = shard(tmp_path, "none", 0, train=0, valid=0, test=0)
    said = refused(tmp_path, [questions, none], "questions=1", "none=1", none="valid")
    assert said.startswith("source 'none' has no packs of valid in 1 shards; see 'dropped' in their records")


def rendered(root: Path, number: int, *, rows: int, dropped: list[int]) -> Path:
    """A rendered shard with its record, as rule render_chat leaves them; the blend reads the record alone."""
    path, reason = root / f"chat/questions/part_{number}.parquet", "an empty answer"
    with making(
        "render_chat", f"questions/part_{number}", outputs={"chats": path}, record=path.with_suffix(".json")
    ) as job:
        job.aside["chats"].write_bytes(f"shard {number}".encode())
        listed = [{"file": f"{number}.jsonl", "row": row, "reason": reason, "detail": ""} for row in dropped]
        job.counts = {"rows": rows, "dropped": {reason: len(dropped)}, "dropped_rows": listed}
    return path


def test_what_the_shards_of_a_source_lost_is_one_line_for_rows_and_one_for_conversations(tmp_path, caplog):
    """Three shards with 90 rows lost 3 of them when they were rendered, and two had 2 long conversations."""
    records = []
    for number, dropped in enumerate(([], [7, 8], [1])):
        lost = {"dropped": {"longer than a pack": 2 * (number > 0)}, "conversations": 4}
        chats = rendered(tmp_path, number, rows=30, dropped=dropped)
        records.append(shard(tmp_path, "questions", number, of_train=lost, chats=chats))
    blend(tmp_path, records, "questions=1")
    assert [line.message for line in caplog.records if line.levelname == "WARNING"] == [
        "source questions: dropped 3 of 90 rows (3 x an empty answer); the first is 1.jsonl:7: "
        "an empty answer (remove the message, or the row); "
        f"dropped_rows in {tmp_path}/chat/questions/*.json lists them",
        "source questions: 4 of 18 conversations are left out (4 longer than a pack); "
        "packs of 16 tokens keep 100.0%",
    ]


def test_files_without_packs_are_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    records = [shard(tmp_path, "questions", 0), shard(tmp_path, "questions", 1, train=0, valid=0, test=0)]
    value = blend(tmp_path, records, "questions=1")
    assert [len(value["splits"][split][0]["files"]) for split in ("train", "valid", "test")] == [1, 1, 1]
    assert "source questions: 1 of its 2 shards have no packs in train: left out there" in caplog.text


def test_a_source_without_training_packs_is_an_error(tmp_path):
    records = [shard(tmp_path, "questions", 0), shard(tmp_path, "tools", 0, train=0)]
    message = refused(tmp_path, records, "questions=0.5", "tools=0.5")
    assert message.startswith("source 'tools' has no packs to train on in 1 shards")
    assert refused(tmp_path, records[:1], "questions=0.5", "tools=0.5").startswith(
        "source 'tools' has no packs"
    )


def test_a_shard_whose_source_has_no_weight_is_an_error(tmp_path):
    records = [shard(tmp_path, "questions", 0), shard(tmp_path, "tools", 0)]
    assert refused(tmp_path, records, "questions=1").startswith(
        "sft/tools/part_0.json: source 'tools' has no weight"
    )


def test_shards_of_a_source_have_one_template(tmp_path):
    """Sources may each have their own."""
    other = {"template_sha256": "d"}
    records = [shard(tmp_path, "questions", 0), shard(tmp_path, "questions", 1, **other)]
    assert refused(tmp_path, records, "questions=1").startswith(
        "sft/questions/part_1.json: made with template_sha256 d, but sft/questions/part_0.json of its source "
        "with c; "
    )


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"template_sha256"}))
def test_shards_that_are_made_differently_are_an_error(tmp_path, name):
    records = [shard(tmp_path, "questions", 0), shard(tmp_path, "tools", 0, **{name: "other"})]
    message = refused(tmp_path, records, "questions=0.5", "tools=0.5")
    expected = (
        f"sft/tools/part_0.json: made with {name} other, but sft/questions/part_0.json with {SETTINGS[name]}"
    )
    assert message.startswith(expected)


def test_a_missing_file_is_an_error(tmp_path):
    record = shard(tmp_path, "questions", 0)
    (tmp_path / "sft/valid/questions/part_0.parquet").unlink()
    message = refused(tmp_path, [record], "questions=1")
    assert message.startswith(
        "sft/valid/questions/part_0.parquet: no such file, and sft/questions/part_0.json"
    )


def test_a_file_of_another_size_is_an_error(tmp_path):
    record = shard(tmp_path, "questions", 0)
    path = tmp_path / "sft/train/questions/part_0.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    size = path.stat().st_size
    assert refused(tmp_path, [record], "questions=1").startswith(
        f"sft/train/questions/part_0.parquet: {size} bytes, and sft/questions/part_0.json says {size + 1}; "
    )


def test_another_record_is_an_error(tmp_path):
    with making("tokenizer", "a", outputs={}, record=tmp_path / "a.json"):
        pass
    assert (
        refused(tmp_path, [tmp_path / "a.json"], "questions=1")
        == "a.json: a record of tokenizer, not of pack_sft"
    )


def test_the_same_shard_twice_is_an_error(tmp_path):
    record = shard(tmp_path, "questions", 0)
    assert "is given twice" in refused(tmp_path, [record, record], "questions=1")


def test_a_trainer_reads_the_blend_and_gets_its_sources(tmp_path):
    blend(
        tmp_path,
        [shard(tmp_path, "questions", 0), shard(tmp_path, "tools", 0, test=0, template_sha256="d")],
        "questions=1",
        "tools=1",
    )
    loaded = check_packed_blend(tmp_path / "sft/blend.json", tokenizer_sha256="t", pack_size=8)
    assert loaded.padding_multiple == 1
    assert [s.template_sha256 for s in loaded.splits["train"]] == ["c", "d"]
    assert [(s.source, s.weight, len(s.files)) for s in loaded.splits["train"]] == [
        ("questions", 0.5, 1),
        ("tools", 0.5, 1),
    ]
    assert [s.source for s in loaded.splits["test"]] == ["questions"]


def test_a_trainer_refuses_a_blend_for_something_else(tmp_path):
    blend(tmp_path, [shard(tmp_path, "questions", 0)], "questions=1")
    with pytest.raises(UserError, match=r"blend\.json: was made with pack_size 8, and 16 is wanted"):
        check_packed_blend(tmp_path / "sft/blend.json", pack_size=16)
    (tmp_path / "sft/train/questions/part_0.parquet").unlink()
    with pytest.raises(UserError, match=r"part_0\.parquet: no such file"):
        check_packed_blend(tmp_path / "sft/blend.json", pack_size=8)
    (tmp_path / "sft/blend.json").write_text("{}")
    with pytest.raises(UserError, match="not a blend of packed chats"):
        check_packed_blend(tmp_path / "sft/blend.json", pack_size=8)
    with pytest.raises(UserError, match="no such blend"):
        check_packed_blend(tmp_path / "sft/none.json")

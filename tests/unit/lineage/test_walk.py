"""How records lead from an artifact back to the raw files."""

from __future__ import annotations

import shutil
from pathlib import Path

from snaketron import files
from snaketron.lineage.record import Entry, making, read
from snaketron.lineage.walk import ancestors, known, lost, record_about, record_of, why_lost
from snaketron.log import UserError
from tests.unit.lineage.conftest import prune

import pytest


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def make(output: Path, *inputs: Path, record: Path, kind: str = "thing") -> Path:
    """Write a file of its own name, made from `inputs`, with its record."""
    with making(kind, output.stem, outputs={"made": output}, record=record) as job:
        job.aside["made"].write_text(output.name)
        job.inputs = {"from": inputs}
    return output


def entry(path: Path) -> Entry:
    return Entry("input", str(path), files.sha256(path))


def place(path: Path) -> Path | None:
    """Where the record of what made a file lies."""
    made = record_of(entry(path))
    return made and made[0]


def test_the_record_of_a_file_lies_beside_it(tmp_path: Path):
    one = make(tmp_path / "docs/a.bin", record=tmp_path / "docs/a.json")
    two = make(tmp_path / "blend/blend.json", record=tmp_path / "blend/record.json")
    three = make(tmp_path / "raw/a.jsonl", record=tmp_path / "raw/a.jsonl.json")
    assert place(one) == tmp_path / "docs/a.json"
    assert place(two) == tmp_path / "blend/record.json"
    assert place(three) == tmp_path / "raw/a.jsonl.json"
    assert place(tmp_path / "docs/a.json") == tmp_path / "docs/a.json"  # a record given as the input
    assert place(write(tmp_path / "raw.jsonl", "{}")) is None


def test_a_file_that_was_made_again_is_not_the_one_that_was_used(tmp_path: Path):
    make(tmp_path / "a.bin", record=tmp_path / "a.json")
    assert record_of(Entry("input", str(tmp_path / "a.bin"), "of another one")) is None
    record = tmp_path / "a.json"
    used = entry(record)
    record.write_text(record.read_text().replace('"thing"', '"other"'))
    assert record_of(used) is None


def test_a_checkpoint_has_its_record_inside(tmp_path: Path):
    record = tmp_path / "ckpt/sft/record.json"
    with making("checkpoint", "sft", outputs={}, record=record) as job:
        job.key = "0a"
    found = record_of(Entry("base", str(tmp_path / "ckpt/sft"), version="sft-0a"))
    assert found == (record, job.record)


def test_a_checkpoint_that_was_trained_again_has_its_record_beside_the_new_one(rebuilt: Path):
    """Not that of the version to which the link leads now."""
    base = Entry("base", "ckpt/pretrain/one", version="pretrain/one-0a")
    found = record_of(base)
    assert found and found[0] == rebuilt / "ckpt/versions/pretrain_one-0a/record.json"
    sft = read(Path("imp/ckpt/sft/record.json"))
    versions = [record.version for record in ancestors(sft.inputs).values() if record.kind == "checkpoint"]
    assert versions == ["pretrain/one-0a", "sft-0b"]
    assert lost([*ancestors(sft.inputs).values(), sft]) == []


def test_a_checkpoint_that_was_trained_again_and_removed_is_lost(rebuilt: Path):
    prune("pretrain/one-0a")
    base = Entry("base", "ckpt/pretrain/one", version="pretrain/one-0a")
    assert record_of(base) is None
    sft = read(Path("imp/ckpt/sft/record.json"))
    behind = [*ancestors(sft.inputs).values(), sft]
    assert [record.version for record in behind if record.kind == "checkpoint"] == ["sft-0b", "sft-0f"]
    assert lost(behind) == [base]
    assert why_lost(base) == "replaced since by pretrain/one-0d, and the record of pretrain/one-0a is gone"
    Path("ckpt/pretrain/one").unlink()
    assert record_of(base) is None
    assert why_lost(base) == "no record of pretrain/one-0a is there any more"


def test_a_checkpoint_with_a_damaged_record_is_not_said_to_have_none(lineage: Path):
    record = Path("ckpt/versions/pretrain_one-0a/record.json")
    record.write_bytes(record.read_bytes()[:100])
    base = Entry("base", "ckpt/pretrain/one", version="pretrain/one-0a")
    assert record_of(base) is None
    said = why_lost(base)
    assert said.startswith("its record is damaged: ckpt/pretrain/one/record.json: not a lineage record (")


def test_a_model_from_another_directory_is_followed_there(imported: Path):
    """Its records name paths of that directory, and here is another ckpt/sft."""
    ours = read(Path("ckpt/sft/record.json"))
    behind = ancestors(ours.inputs)
    assert [record.name for record in behind.values()] == [
        *("tokenizer", "docs/a", "docs/b", "one", "pretrain/one", "sft", "sft", "base/it")
    ]
    assert lost([*behind.values(), ours]) == []


def test_what_a_model_of_another_directory_was_trained_on_may_be_left_out(imported: Path):
    """Nothing behind it is said to be lost."""
    ours = read(Path("ckpt/sft/record.json"))
    behind = ancestors(ours.inputs, of_others=False)
    assert [(record.kind, record.name) for record in behind.values()] == [
        ("export", "sft"),
        ("checkpoint", "base/it"),
    ]
    assert lost([*behind.values(), ours]) == []


def test_what_is_lost_of_another_directory_is_told_with_its_path(imported: Path):
    work = imported.parent / "work"
    shutil.rmtree(work / "ckpt/versions/pretrain_one-0a")
    ours = read(Path("ckpt/sft/record.json"))
    (gone,) = lost([*ancestors(ours.inputs).values(), ours])
    assert (gone.path, gone.version) == (str(work / "ckpt/pretrain/one"), "pretrain/one-0a")


def test_an_input_is_taken_from_the_record_about_it_without_reading_it_again(tmp_path: Path):
    make(tmp_path / "a/other.bin", record=tmp_path / "a/record.json")
    made = make(tmp_path / "a/made.bin", record=tmp_path / "a/made.json")
    assert record_about(made).name == "made"  # and not that of the directory, which is about another file
    digest = files.sha256(made)
    made.write_text("changed")
    assert known(made) == Entry("made", str(made), digest, 8)
    with pytest.raises(UserError, match=r"none.json: no such record"):
        record_about(tmp_path / "a/none.bin")


def test_ancestors_are_listed_once_and_after_their_own(tmp_path: Path):
    """raw -> tokenizer -> shard -> blend, and raw -> shard, tokenizer -> blend."""
    raw = write(tmp_path / "raw.jsonl", "{}")
    tokenizer = make(tmp_path / "tokenizer/t.json", raw, record=tmp_path / "tokenizer/record.json", kind="t")
    shard = make(tmp_path / "docs/a.bin", raw, tokenizer, record=tmp_path / "docs/a.json", kind="shard")
    blend = make(
        tmp_path / "blend/b.json", tokenizer, shard, record=tmp_path / "blend/record.json", kind="blend"
    )
    found = ancestors(map(entry, (blend, tokenizer)))
    assert list(found) == [
        tmp_path / "tokenizer/record.json",
        tmp_path / "docs/a.json",
        tmp_path / "blend/record.json",
    ]
    assert [record.kind for record in found.values()] == ["t", "shard", "blend"]


def test_records_that_lead_in_a_circle_are_found_once(tmp_path: Path):
    """The tokenizer is taken from an export of the model that was trained with it."""
    tokenizer = make(tmp_path / "tokenizer/tokenizer.json", record=tmp_path / "tokenizer/record.json")
    model = make(tmp_path / "ckpt/model.bin", tokenizer, record=tmp_path / "ckpt/record.json")
    export = make(tmp_path / "hf/tokenizer.json", model, record=tmp_path / "hf/record.json")
    make(tokenizer, export, record=tmp_path / "tokenizer/record.json")
    found = ancestors([entry(model)])
    assert list(found) == [tmp_path / name / "record.json" for name in ("hf", "tokenizer", "ckpt")]

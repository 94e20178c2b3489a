"""What made an artifact and who used it, found by hashes, in a directory that may have been moved."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from snaketron.files import sha256
from snaketron.lineage.catalogue import root_of, scan
from snaketron.lineage.record import Entry, making
from snaketron.log import UserError
from tests.unit.lineage.conftest import job, tokens, write

import pytest

ORDER = [
    "tokenizer",
    "tokens docs/a",
    "tokens docs/b",
    "blend one",
    "checkpoint pretrain/one",
    "checkpoint sft",
]


def titles(root: Path, of: str = "ckpt/sft") -> list[str]:
    catalogue = scan(root)
    return [made.title for made in catalogue.ancestors(catalogue.about(root / of))]


def test_everything_behind_a_checkpoint_comes_before_it(lineage: Path):
    assert titles(lineage) == ORDER


def test_an_artifact_is_found_by_any_of_its_paths(lineage: Path):
    catalogue = scan(lineage)
    places = {
        "ckpt/sft": "checkpoint sft",
        "ckpt/versions/sft-0b": "checkpoint sft",
        "ckpt/sft/record.json": "checkpoint sft",
        "ckpt/sft/iter_0000010/weights": "checkpoint sft",
        "data/tokens/docs/train/b.bin": "tokens docs/b",
        "data/tokens/docs/b.parquet": "tokens docs/b",
        "data/tokens/docs/b.json": "tokens docs/b",
        "data/pretrain/one/blend.json": "blend one",
    }
    assert {path: catalogue.about(Path(path)).title for path in places} == places
    copy = shutil.copy("data/tokens/docs/train/b.bin", "copy.bin")  # as eval/sft.json is one
    assert catalogue.about(Path(copy)).title == "tokens docs/b"
    with pytest.raises(UserError, match=r"raw/a.jsonl: no record says what .*; it is an input: --who-uses"):
        catalogue.about(Path("raw/a.jsonl"))
    with pytest.raises(UserError, match="nothing: no such file or directory, and no record lists it"):
        catalogue.about(Path("nothing"))


@pytest.mark.parametrize("text", [b'{\n  "kind": "tokens",\n  "name": "docs', b"", b"\0" * 900])
def test_a_damaged_record_is_named_and_not_taken_for_none(
    lineage: Path, caplog: pytest.LogCaptureFixture, text: bytes
):
    """As a full disk or a lost machine leaves one."""
    for path in ("data/tokens/docs/a.json", "ckpt/sft/record.json"):
        Path(path).write_bytes(text)
    catalogue = scan(lineage)
    there = f"{lineage}/ckpt/versions/sft-0b/record.json, {lineage}/data/tokens/docs/a.json"
    assert caplog.messages == [f"damaged records, and what they tell is missing here: {there}"]
    for asked, record in (
        ("ckpt/sft", "ckpt/sft/record.json"),
        ("data/tokens/docs/a.json", "data/tokens/docs/a.json"),
        ("data/tokens/docs/a.parquet", "data/tokens/docs/a.json"),
    ):
        with pytest.raises(UserError, match=rf"^{asked}: its record is damaged: {record}: not a lineage rec"):
            catalogue.about(Path(asked))


def test_files_of_the_user_beside_raw_files_are_no_damaged_records(
    lineage: Path, caplog: pytest.LogCaptureFixture
):
    write("raw/a.json", '{"text": "a"}\n{"text": "b"}\n')
    write("raw/record.json", '{"kind": "of mine"}')
    catalogue = scan(lineage)
    assert not caplog.messages
    with pytest.raises(UserError, match="no record says what it was made from"):
        catalogue.about(Path("raw/a.jsonl"))


def test_a_directory_that_was_moved_tells_the_same(lineage: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere/data/new"
    moved.parent.mkdir(parents=True)
    for link in ("pretrain/one", "sft"):  # those of the workflow are relative
        Path("ckpt", link).unlink()
    shutil.move(lineage, moved)
    assert titles(moved, "ckpt/versions/sft-0b") == ORDER
    made = scan(moved).about(moved / "data/tokens/docs/a.json")
    assert [made.place(entry) for entry in made.record.outputs] == [
        moved / "data/tokens/docs/train/a.bin",
        moved / "data/tokens/docs/a.parquet",
    ]
    assert made.place(made.record.inputs[0]) == moved / "raw/a.jsonl"


def test_a_root_with_an_absolute_path_may_move_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    raw, root = write(str(tmp_path / "raw/a.jsonl"), "{}"), tmp_path / "scratch/data"
    outputs = {"train.bin": str(root / "tokens/docs/train/a.bin")}
    job("tokens", "docs/a", str(root / "tokens/docs/a.json"), {"text": raw}, outputs)
    unmoved = scan(tmp_path).all[0]
    assert unmoved.place(unmoved.record.outputs[0]) == root / "tokens/docs/train/a.bin"
    shutil.move(root.parent, tmp_path / "other")
    made = scan(tmp_path).all[0]
    assert made.place(made.record.outputs[0]) == tmp_path / "other/data/tokens/docs/train/a.bin"
    assert made.place(made.record.inputs[0]) == raw  # which has stayed


def test_records_that_lie_elsewhere_are_found_by_the_paths_of_inputs(lineage: Path, tmp_path: Path):
    data = tmp_path / "far/tokens"
    job("tokens", "docs/c", str(data / "c.json"), {"text": Path("raw/a.jsonl")}, {"bin": str(data / "c.bin")})
    job(
        "blend", "two", "data/two/record.json", {"records": data / "c.json"}, {"blend": "data/two/blend.json"}
    )
    assert titles(lineage, "data/two/blend.json") == ["tokens docs/c", "blend two"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_base_that_was_trained_again_is_the_version_that_was_used(
    rebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
):
    """Its root is not among those that were read; also where the question is asked in another directory."""
    if elsewhere:
        monkeypatch.chdir(tmp_path)
    for root in (rebuilt, rebuilt / "imp"):
        catalogue = scan(root)
        behind = list(catalogue.ancestors(catalogue.about(rebuilt / "imp/ckpt/sft")))
        assert [made.version for made in behind if made.version] == ["pretrain/one-0a", "sft-0b", "sft-0f"]


def test_a_file_that_was_made_again_is_not_the_one_that_was_used(lineage: Path):
    used = scan(lineage).about(Path("data/pretrain/one/blend.json")).record.inputs[0]
    write("raw/a.jsonl", '{"text": "another"}\n')
    tokens("a", "raw/a.jsonl")
    catalogue = scan(lineage)
    blend = catalogue.about(Path("data/pretrain/one/blend.json"))
    assert catalogue.made_by(used, blend) is None
    assert [m.title for m in catalogue.ancestors(blend)] == ["tokenizer", "tokens docs/b", "blend one"]
    remade = catalogue.remade(used)
    assert remade is not None and remade.title == "tokens docs/a"


def test_a_job_that_copies_a_file_did_not_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    template = write("config/t.jinja", "hello")
    with making("t", "t", outputs={"t": Path("data/t.jinja")}, record=Path("data/t.json")) as made:
        made.aside["t"].write_text("hello")
        made.inputs = {"template": template}
    catalogue = scan(tmp_path)
    assert [m.title for m in catalogue.ancestors(catalogue.all[0])] == ["t"]


def test_users_are_those_of_the_record_and_of_the_files(lineage: Path):
    catalogue = scan(lineage)
    shard = catalogue.about(Path("data/tokens/docs/a.json"))
    assert [(made.title, entry.name) for made, entry in catalogue.users_of(shard)] == [
        ("blend one", "records")
    ]
    (base,) = (m for m in catalogue.all if m.version == "pretrain/one-0a")
    assert [(made.title, entry.name) for made, entry in catalogue.users_of(base)] == [
        ("checkpoint sft", "base")
    ]
    digest = sha256(Path("raw/a.jsonl"))
    assert sorted(made.title for made, _ in catalogue.users(digest)) == ["tokenizer", "tokens docs/a"]
    assert catalogue.users("unknown") == []


def test_what_is_no_record_is_passed_over(lineage: Path):
    before = len(scan(lineage).all)
    write("data/tokens/docs/raw.json", json.dumps({"kind": "of fruit"}))
    write("data/tokens/docs/cut.json", '{\n  "kind": "tokens", "outp')
    write(
        ".hidden/record.json",
        Path("data/pretrain/one/record.json").read_text(encoding="utf-8").replace("one", "two"),
    )
    Path("again").symlink_to("data")  # the same directory under another name
    Path("data/loop").symlink_to("..")
    shutil.copytree("data", "copy", symlinks=True)
    assert len(scan(lineage).all) == before


def test_the_working_directory_of_an_artifact_is_found(lineage: Path, tmp_path: Path, monkeypatch):
    assert root_of(Path("ckpt/sft")) == lineage
    monkeypatch.chdir(tmp_path)
    assert root_of(lineage / "ckpt/sft") == lineage
    (lineage / "store/data").mkdir(parents=True)  # of the user
    assert root_of(lineage / "store/data/a.jsonl") == lineage
    monkeypatch.chdir(lineage / "data")
    with pytest.raises(UserError, match=r"lies in no working directory of the workflow; name .* with --root"):
        root_of(Path("/nowhere/at/all"))


def test_entries_of_the_hub_and_of_addresses_have_no_maker(lineage: Path):
    catalogue = scan(lineage)
    entry = Entry("origin", "acme/tokenizer", revision="0c0c")
    assert catalogue.made_by(entry, catalogue.all[0]) is None


def test_what_was_imported_from_another_directory_leads_there(imported: Path):
    """By the equal config.json its own, later export was the origin, and a removal left that export out."""
    assert titles(imported, "hf/sft") == [
        *ORDER,
        "export sft",
        "checkpoint base/it",
        "checkpoint sft",
        "export sft",
    ]
    assert titles(imported, "ckpt/sft")[-3:] == ["export sft", "checkpoint base/it", "checkpoint sft"]
    catalogue = scan(imported)
    ours = next(made for made in catalogue.all if made.record.kind == "export")
    assert catalogue.users_of(ours) == []


def test_what_was_made_later_is_no_origin(imported: Path):
    """The other directory is gone; all that is left with the hash of its config.json was made of it."""
    shutil.rmtree(imported.parent / "work")
    record = imported / "hf/sft/record.json"
    later = re.sub(r'"created": "\d+', '"created": "2999', record.read_text(encoding="utf-8"))
    record.write_text(later, encoding="utf-8")
    assert '"created": "2999' in later
    assert titles(imported, "hf/sft") == ["checkpoint base/it", "checkpoint sft", "export sft"]
    catalogue = scan(imported)
    assert catalogue.users_of(catalogue.about(imported / "hf/sft")) == []

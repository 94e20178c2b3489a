"""Files are compared with their records, each state of one is read once, and an interrupt loses nothing."""

from __future__ import annotations

import os
from pathlib import Path

from snaketron.files import directory_sha256
from snaketron.lineage import verify
from snaketron.lineage.catalogue import scan
from snaketron.lineage.record import Entry, making
from snaketron.lineage.verify import STATE, Found, State, named
from tests.unit.lineage.conftest import prune, tokens, write

import pytest

# 2 raw files, a tokenizer, 2 x 2 files of shards, a blend, the weights of 2 trainings
FILES = 10


def check(all_again: bool = False, of: str = "ckpt/sft", root: str = "") -> Found:
    catalogue = scan(Path.cwd() / root)
    wanted = named(catalogue, catalogue.about(Path(of)))
    return verify.verify(wanted, State(Path(STATE), all_again=all_again), workers=1)


def numbers(found: Found) -> tuple[int, int, int]:
    return found.read, found.unchanged, len(found.problems)


def test_a_file_is_read_again_when_its_size_or_time_is_another(lineage: Path):
    assert numbers(check()) == (FILES, 0, 0)
    assert numbers(check()) == (0, FILES, 0)
    os.utime("raw/a.jsonl", ns=(1, 1))
    assert numbers(check()) == (1, FILES - 1, 0)


def test_what_differs_and_what_is_missing_is_named(lineage: Path):
    check()
    weights = Path("ckpt/sft/iter_0000010/weights").resolve().relative_to(lineage)
    weights.write_text("other weights")
    Path("raw/b.jsonl").unlink()
    found = check()
    assert numbers(found) == (1, FILES - 2, 2)
    different, missing = found.problems
    assert different.startswith(f"{weights}: differs: sha256 ") and "and " in different
    assert missing.startswith("raw/b.jsonl: not here any more (record ")
    assert "2 problems" in found.told
    assert numbers(check()) == (0, FILES - 1, 2)  # it stays wrong without being read again


def test_a_silent_change_is_found_when_all_is_read(lineage: Path):
    check()
    raw = Path("raw/a.jsonl")
    state = raw.stat()
    raw.write_text(raw.read_text(encoding="utf-8").replace("a", "b"), encoding="utf-8")
    os.utime(raw, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert numbers(check()) == (0, FILES, 0)
    assert numbers(check(all_again=True)) == (FILES, 0, 1)


@pytest.mark.parametrize("all_again", [False, True])
def test_a_check_goes_on_where_it_was_interrupted(lineage: Path, monkeypatch, all_again: bool):
    check()
    if not all_again:
        Path(STATE).unlink()
    hashed = []

    def interrupted(path: Path) -> str:
        if len(hashed) == 4:
            raise KeyboardInterrupt
        hashed.append(path)
        return verify.sha256(path)

    with monkeypatch.context() as patch:
        patch.setattr(verify, "_hash", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check(all_again)
    assert numbers(check(all_again)) == (FILES - 4, 4, 0)
    # The next check of all files begins anew.
    assert numbers(check(all_again=True)) == (FILES, 0, 0)


def test_an_input_that_was_made_again_has_no_origin(lineage: Path):
    write("raw/a.jsonl", '{"text": "another"}\n')
    tokens("a", "raw/a.jsonl")
    (problem,) = (p for p in check().problems if "a.json:" in p)
    assert "made again since, on " in problem and "its origin is not recorded" in problem


@pytest.mark.parametrize("root", [".", "imp"])
def test_a_base_that_was_trained_again_is_checked_and_without_its_record_is_not_read(
    rebuilt: Path, root: str
):
    """The files of the small lineage, and the weights of imp/ckpt/sft."""
    assert numbers(check(of="imp/ckpt/sft", root=root)) == (FILES + 1, 0, 0)
    prune("pretrain/one-0a")
    found = check(of="imp/ckpt/sft", root=root)
    assert numbers(found) == (0, FILES, 1)
    why = "replaced since by pretrain/one-0d, and the record of pretrain/one-0a is gone"
    assert f"ckpt/pretrain/one: {why} (record " in found.problems[0]


def test_a_directory_is_one_output(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("ckpt/index/one.npy", "1")
    with making("checkpoint", "sft", outputs={}, record=Path("ckpt/record.json")) as made:
        made.present = [Entry("index", "ckpt/index", directory_sha256(Path("ckpt/index")), 1)]
    catalogue = scan(tmp_path)

    def problems() -> int:
        wanted = named(catalogue, catalogue.all[0])
        return len(verify.verify(wanted, State(Path(STATE), all_again=False)).problems)

    write("ckpt/index/.snakemake_timestamp", "")
    assert problems() == 0
    write("ckpt/index/two.npy", "2")
    assert problems() == 1


def test_a_state_that_cannot_be_read_or_written_is_no_obstacle(lineage: Path, caplog):
    write(STATE, "{")
    assert numbers(check()) == (FILES, 0, 0)
    Path(STATE).unlink()
    Path(STATE).mkdir()
    assert numbers(check()) == (FILES, 0, 0)
    assert "cannot be written" in caplog.text


def test_the_script_fails_where_something_is_wrong(lineage: Path, run_script, capsys):
    assert run_script("lineage", "ckpt/sft", "--verify") == (0, "")
    Path("raw/b.jsonl").write_text("{}", encoding="utf-8")
    assert run_script("lineage", "ckpt/sft", "--verify")[0] == 1

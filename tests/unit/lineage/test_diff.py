"""Why two artifacts differ, from their settings down to the raw files."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

from snaketron.files import sha256
from snaketron.lineage.catalogue import scan
from snaketron.lineage.diff import Side, differences, values
from tests.unit.lineage import conftest
from tests.unit.lineage.conftest import prune, train, write

import pytest


@pytest.fixture
def other(lineage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second working directory, in which the test now runs, with the same raw files."""
    directory = tmp_path / "other"
    shutil.copytree(lineage / "raw", directory / "raw")
    monkeypatch.chdir(directory)
    return directory


def diff(one: Path, other: Path, path: str = "ckpt/sft", second: str = "") -> list[str]:
    sides = []
    for root, of in ((one, path), (other, second or path)):
        catalogue = scan(root)
        sides.append(Side(catalogue, catalogue.about(root / of)))
    return differences(*sides)


def test_the_same_jobs_on_the_same_files_differ_in_nothing(
    lineage: Path, other: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their records do, in what they say of the cost, and so in the hashes by which a blend names them."""
    clock = itertools.count(step=1_000.0)  # seconds: no job of the first directory took so long
    monkeypatch.setattr("snaketron.lineage.record.cpu_seconds", lambda: next(clock))
    conftest.run()
    names = [
        scan(root).about(root / "data/pretrain/one/blend.json").record.inputs for root in (lineage, other)
    ]
    assert names[0] != names[1]
    assert diff(lineage, other) == diff(lineage, other, "data/pretrain/one/blend.json") == []


def test_settings_differ_key_by_key(lineage: Path):
    train("sft", "0c", "data/pretrain/one/blend.json", base="pretrain/one-0a", seed=2, optimizer={"lr": 1})
    catalogue = scan(lineage)
    sides = [Side(catalogue, catalogue.about(Path(f"ckpt/versions/sft-{key}"))) for key in ("0b", "0c")]
    first, second, third = differences(*sides)
    assert [first, second] == ["settings.seed: 1 | 2", "settings.optimizer.lr: not set | 1"]
    assert third.startswith("output weights: sha256 ")


def test_a_key_that_a_record_leaves_out_had_its_default():
    """A phase has a seed of its own, and a template is told another date. Nobody leaves out a color."""
    one, other = {"seed": 1}, {"seed": 1, "data_seed": 5, "color": "red"}
    assert values(one, other, "checkpoint") == ["data_seed: 1 | 5", "color: not set | red"]
    before, now = {"source": "docs"}, {"source": "docs", "template_date": "2026-11-30"}
    assert values(before, now, "render_chat") == ["template_date: 2026-01-01 | 2026-11-30"]


def test_a_raw_file_that_differs_is_found_through_all_that_was_made_of_it(lineage: Path, other: Path):
    write("raw/b.jsonl", '{"text": "another b"}\n')
    conftest.run()
    hashes = [sha256(root / "raw/b.jsonl") for root in (lineage, other)]
    lines = [
        line.partition(" sha256")[0].rstrip() for line in diff(lineage, other, "data/pretrain/one/blend.json")
    ]
    assert lines == [
        "records data/tokens/docs/b.json:",
        f"  text raw/b.jsonl: {hashes[0][:24]} | {hashes[1][:24]}",
        "  output train.bin:",
        "  output documents:",
        "output blend.json:",
    ]


def test_a_base_that_was_trained_again_is_compared_as_it_was(rebuilt: Path):
    """And where its record was removed, the versions are named, and why there is no more to say."""
    assert diff(rebuilt, rebuilt, "ckpt/versions/sft-0b", "ckpt/sft")[1:3] == [
        "base ckpt/pretrain/one:",
        "  settings.seed: not set | 2",
    ]
    prune("pretrain/one-0a")
    assert diff(rebuilt, rebuilt, "ckpt/versions/sft-0b", "ckpt/sft")[1:3] == [
        "base ckpt/pretrain/one: pretrain/one-0a | pretrain/one-0d",
        "  in the first: replaced since by pretrain/one-0d, and the record of pretrain/one-0a is gone",
    ]


def test_what_is_below_two_branches_is_told_once(lineage: Path, other: Path):
    write("raw/b.jsonl", '{"text": "another b"}\n')
    conftest.run(key="0d")
    lines = [line.partition(" sha256")[0] for line in diff(lineage, other)]
    assert [line for line in lines if "output" not in line and "raw" not in line] == [
        "blend data/pretrain/one/blend.json:",
        "  records data/tokens/docs/b.json:",
        "base ckpt/pretrain/one:",
        "  blend data/pretrain/one/blend.json: differs, as told above",
    ]
    assert sum("raw/b.jsonl" in line for line in lines) == 1


def test_inputs_that_only_one_has_are_named(lineage: Path, other: Path):
    conftest.run()
    shards = [Path("data/tokens/docs/a.json")]
    outputs = {"blend.json": "data/pretrain/one/blend.json"}
    conftest.job("blend", "one", "data/pretrain/one/record.json", {"records": shards}, outputs, weight=1.0)
    lines = diff(lineage, other, "data/pretrain/one/blend.json")
    assert "records data/tokens/docs/b.json: only in the first" in lines
    assert "tokenizer data/tokenizer/tokenizer.json: only in the first" in lines


def test_the_script_says_whether_they_differ(lineage: Path, other: Path, run_script, monkeypatch):
    conftest.run()
    assert run_script("lineage", "--diff", lineage / "raw", other / "ckpt/sft")[0] == 1  # no record: an error
    blends = [root / "data/tokens/docs/a.json" for root in (lineage, other)]
    assert run_script("lineage", "--diff", *blends) == (0, "")
    write("raw/a.jsonl", "another")
    conftest.run()
    assert run_script("lineage", "--diff", *blends) == (1, "")

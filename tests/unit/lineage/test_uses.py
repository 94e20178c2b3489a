"""Who used a raw file: by its path, its hash or the beginning of one; with its text or by an influence."""

from __future__ import annotations

from pathlib import Path

from snaketron.files import sha256
from snaketron.lineage import uses, words
from snaketron.lineage.catalogue import roots_of, scan
from snaketron.log import UserError
from tests.unit.lineage.conftest import BLEND, job, tokens, train, write

import pytest


def found(what: str) -> tuple[list[str], list[str]]:
    catalogue = scan(*roots_of(Path(what)))
    reached = uses.reach(catalogue, [uses.source(catalogue, what)])
    return [made.title for made in reached.holders], [made.title for made in reached.influenced]


AFTER = ["blend one", "checkpoint pretrain/one", "checkpoint sft"]


def test_a_file_reaches_what_was_made_of_its_text(lineage: Path):
    assert found("raw/b.jsonl") == (["tokens docs/b", *AFTER], [])


def test_a_file_of_elsewhere_reaches_what_was_made_of_it_here_and_there(lineage: Path, monkeypatch):
    """A file in another working directory was looked for there alone, and one in none was an error."""
    beside, raw = lineage.parent / "beside", lineage / "raw/b.jsonl"
    beside.mkdir()
    monkeypatch.chdir(beside)
    store = write(str(lineage.parent / "store/c.jsonl"), "{}\n")
    write("data/tokenizer/tokenizer.json", "{}")
    tokens("copy", str(raw))
    tokens("c", str(store))
    assert sorted(found(str(raw))[0]) == [*AFTER, "tokens docs/b", "tokens docs/copy"]
    assert found(str(store)) == (["tokens docs/c"], [])


def test_two_configurations_in_one_directory_are_told_apart(lineage: Path):
    """With roots of their own in pathvars both have a shard docs/b, and the answer named it twice."""
    outputs = {"train.bin": "other/data/tokens/docs/train/b.bin"}
    inputs = {"text": [Path("raw/b.jsonl")]}
    job("tokens", "docs/b", "other/data/tokens/docs/b.json", inputs, outputs, corpus="docs", more=1)
    catalogue = scan(lineage)
    reached = uses.reach(catalogue, [uses.source(catalogue, "raw/b.jsonl")])
    names = uses.by_kind(reached.holders)
    assert sorted(names["tokens"]) == [
        "docs/b (data/tokens/docs/b.json)",
        "docs/b (other/data/tokens/docs/b.json)",
    ]
    assert names["blend"] == ["one"]


def test_a_tokenizer_has_an_influence_and_holds_no_text(lineage: Path):
    """a.jsonl trained the tokenizer, which made the ids of b.jsonl as well."""
    assert found("raw/a.jsonl") == (["tokenizer", "tokens docs/a", *AFTER], ["tokens docs/b"])


def test_a_hash_and_the_beginning_of_one_name_the_file(lineage: Path):
    digest = sha256(Path("raw/b.jsonl"))
    assert found(digest) == found(digest[:10]) == found("raw/b.jsonl")
    Path("raw/b.jsonl").unlink()
    assert found("raw/b.jsonl") == found(digest)
    assert uses.source(scan(lineage), digest[:10]).name == "raw/b.jsonl"


def test_what_was_trained_on_a_blend_that_was_made_again_is_not_known(lineage: Path, run_script):
    """Its record is that of the new blend, and nothing else tells what was in the old one."""
    assert uses.unknown(scan(lineage)) == []
    assert run_script("lineage", "--who-uses", "raw/b.jsonl") == (0, "")
    shards = [Path(f"data/tokens/docs/{name}.json") for name in ("a", "b")]
    inputs, outputs = {"records": shards}, {"blend.json": BLEND}
    job("blend", "one", "data/pretrain/one/record.json", inputs, outputs, weight=2.0)
    train("pretrain/one", "0d", BLEND)
    assert found("raw/b.jsonl")[0] == ["tokens docs/b", "blend one", "checkpoint pretrain/one"]
    assert [made.version for made in uses.unknown(scan(lineage))] == ["pretrain/one-0a", "sft-0b"]
    told = "not known of pretrain/one-0a, sft-0b: the blends behind them were made again, or removed, since\n"
    assert run_script("lineage", "--who-uses", "raw/b.jsonl") == (0, told)


def test_what_was_made_can_be_asked_about_as_well(lineage: Path):
    assert found("data/tokens/docs/train/b.bin")[0] == AFTER
    assert found("ckpt/pretrain/one")[0] == ["checkpoint sft"]
    assert found("ckpt/sft") == ([], [])


def test_a_file_with_the_size_and_time_of_the_record_is_not_read(lineage: Path, monkeypatch):
    monkeypatch.setattr(uses, "sha256", lambda path: pytest.fail("it was read"))
    assert found("raw/b.jsonl")[0][0] == "tokens docs/b"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "raw/changed.jsonl",
            r"^raw/changed.jsonl: no record below /\S+ knows this file \(sha256 [0-9a-f]{12}\): no job there",
        ),
        ("raw/none.jsonl", "^raw/none.jsonl: no such file, and no record below /\\S+ knows a file"),
        (
            "0123456789ab",
            r"^0123456789ab: no record below /\S+ knows a file whose sha256 begins so; name",
        ),
    ],
)
def test_what_nobody_knows_is_said(lineage: Path, what: str, message: str):
    write("raw/changed.jsonl", "new")
    with pytest.raises(UserError, match=message) as caught:
        found(what)
    assert f"below {lineage} knows" in str(caught.value)


def test_a_file_that_was_changed_since_is_not_the_one_that_was_read(lineage: Path):
    digest = sha256(Path("raw/b.jsonl"))
    write("raw/b.jsonl", "other")
    message = rf"was changed since it was read \(sha256 .* now, {digest[:12]} then\); ask by that hash"
    with pytest.raises(UserError, match=message):
        found("raw/b.jsonl")
    assert found(digest)[0][0] == "tokens docs/b"


def test_the_answer_has_a_line_for_each_kind(lineage: Path):
    catalogue = scan(lineage)
    source = uses.source(catalogue, "raw/a.jsonl")
    assert words.used(source, uses.reach(catalogue, [source])) == [
        f"raw/a.jsonl (sha256 {sha256(Path('raw/a.jsonl'))[:12]})",
        "  tokenizer: tokenizer",
        "  tokenized shards: docs/a",
        "  blends: one",
        "  checkpoints: pretrain/one-0a, sft-0b",
        "  no text of it, but an influence, by a tokenizer or a list of what to remove:",
        "    tokenized shards: docs/b",
    ]

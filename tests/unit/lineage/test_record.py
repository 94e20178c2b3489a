"""Records: what they say, when they are refused, and how they lead back to the raw files."""

from __future__ import annotations

import platform
from datetime import datetime
from pathlib import Path

from snaketron import files
from snaketron.lineage import record as lineage
from snaketron.log import UserError

import pytest


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make(output: Path, *inputs: Path, record: Path, kind: str = "thing") -> Path:
    """Write a file of its own name, made from `inputs`, with its record."""
    write(output, output.name)
    value = lineage.record(kind, output.stem, inputs=inputs, outputs=[output], settings={}, counts={})
    files.write_json(record, value)
    return output


def test_a_record_says_what_went_in_and_what_came_out(tmp_path: Path):
    raw, final, aside = (
        write(tmp_path / name, text) for name, text in (("raw", "abc"), ("out", "old"), (".out", "four"))
    )
    value = lineage.record(
        "tokens",
        "docs/a",
        inputs=[raw, {"path": "t.json", "sha256": "ff"}],
        outputs={final: aside},
        settings={"corpus": "docs"},
        counts={"documents": 3},
    )
    assert {k: value[k] for k in ("kind", "name", "settings", "counts")} == {
        "kind": "tokens",
        "name": "docs/a",
        "settings": {"corpus": "docs"},
        "counts": {"documents": 3},
    }
    assert value["inputs"] == [
        {"path": str(raw), "sha256": files.sha256(raw)},
        {"path": "t.json", "sha256": "ff"},
    ]
    # The name that it will have, and what lies under the name that it has now.
    assert value["outputs"] == [{"path": str(final), "sha256": files.sha256(aside), "bytes": 4}]
    assert value["versions"]["python"] == platform.python_version()
    assert value["versions"].keys() >= {"snaketron", "torch", "megatron-core"}
    assert datetime.fromisoformat(value["created"]).tzinfo is not None and value["seconds"] >= 0


def test_an_output_whose_hash_is_known_is_not_read_again(tmp_path: Path):
    one, two = (write(tmp_path / name, "four") for name in ("one", "two"))
    value = lineage.record(
        "k", "n", inputs=[], outputs=[one, two], settings={}, counts={}, hashes={one: "ff"}
    )
    assert [entry["sha256"] for entry in value["outputs"]] == ["ff", files.sha256(two)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such record; the rule that makes it has not finished"),
        ('{"kind": ', "not a lineage record ("),
        ("[1]", "not a lineage record; delete it and run again"),
        ('{"kind": "tokens", "outputs": []}', "not a lineage record; delete it and run again"),
    ],
)
def test_what_is_no_record_is_named(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        lineage.read(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_the_record_of_a_file_lies_beside_it(tmp_path: Path):
    one = make(tmp_path / "docs/a.bin", record=tmp_path / "docs/a.json")
    two = make(tmp_path / "blend/blend.json", record=tmp_path / "blend/record.json")
    raw = write(tmp_path / "raw.jsonl", "{}")

    def record_of(path: Path) -> Path | None:
        return lineage.record_of({"path": str(path), "sha256": files.sha256(path)})

    assert record_of(one) == tmp_path / "docs/a.json"
    assert record_of(two) == tmp_path / "blend/record.json"
    assert record_of(tmp_path / "docs/a.json") == tmp_path / "docs/a.json"  # a record given as the input
    assert record_of(raw) is None


def test_a_file_that_was_made_again_is_not_the_one_that_was_used(tmp_path: Path):
    make(tmp_path / "a.bin", record=tmp_path / "a.json")
    assert lineage.record_of({"path": str(tmp_path / "a.bin"), "sha256": "of another one"}) is None
    record = tmp_path / "a.json"
    entry = {"path": str(record), "sha256": files.sha256(record)}
    record.write_text(record.read_text().replace('"thing"', '"other"'))
    assert lineage.record_of(entry) is None


def test_a_checkpoint_has_its_record_inside(tmp_path: Path):
    entry = {"path": str(tmp_path / "ckpt/sft"), "version": "sft-0a"}
    assert lineage.record_of(entry) == tmp_path / "ckpt/sft/record.json"


def test_ancestors_are_listed_once_and_after_their_own(tmp_path: Path):
    """raw -> tokenizer -> shard -> blend, and raw -> shard, tokenizer -> blend."""
    raw = write(tmp_path / "raw.jsonl", "{}")
    tokenizer = make(tmp_path / "tokenizer/t.json", raw, record=tmp_path / "tokenizer/record.json", kind="t")
    shard = make(tmp_path / "docs/a.bin", raw, tokenizer, record=tmp_path / "docs/a.json", kind="shard")
    blend = make(
        tmp_path / "blend/b.json", tokenizer, shard, record=tmp_path / "blend/record.json", kind="blend"
    )
    found = lineage.ancestors([{"path": str(p), "sha256": files.sha256(p)} for p in (blend, tokenizer)])
    assert list(found) == [
        tmp_path / "tokenizer/record.json",
        tmp_path / "docs/a.json",
        tmp_path / "blend/record.json",
    ]
    assert [record["kind"] for record in found.values()] == ["t", "shard", "blend"]

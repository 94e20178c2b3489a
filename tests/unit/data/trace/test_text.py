"""At which steps a document was trained on, worked out by hand; and why it was not.

A shard has sequences of 5, 3 and 4 tokens, in the order 2, 0, 1. A sample is 4 tokens and a label:

    position   0 1 2 3 | 4 5 6 7 8 | 9 10 11
    sequence   2 2 2 2 | 0 0 0 0 0 | 1  1  1
    sample 0   0 1 2 3   4                     sequences 2 and 0
    sample 1             4 5 6 7 8             sequence 0; its last label is at position 8

No sample holds sequence 1. The shard's samples come in the order 1, 0.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from snaketron.data.text import origins
from snaketron.data.text.order import SampleOrder
from snaketron.data.trace import removal, words
from snaketron.data.trace.fate import Fate, fates
from snaketron.data.trace.rows import rows_with
from snaketron.lineage.catalogue import scan
from snaketron.lineage.record import Entry, of_user
from snaketron.lineage.uses import source
from snaketron.log import UserError
from tests.unit.data.trace.conftest import save_index

import numpy as np
import pytest

ARRAYS = ([2, 0, 1], [[0, 0], [1, 0], [1, 4]], [1, 0])
OTHER = ([0], [[0, 0], [0, 4], [0, 8], [0, 12], [0, 16], [0, 20], [0, 24]], [0, 1, 2, 3, 4, 5])
A, B = "data/tokens/docs/train/a", "data/tokens/docs/train/b"
# Samples 2 and 5 of the 8 are of shard a.
BLENDED = ([1, 1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 2, 3, 1, 4, 5])
# Row 1 is sequence 0, row 2 is held out, row 4 was cut into the sequences 1 and 2; row 3 was dropped.
SEQUENCES = [("train", 0, 1), ("valid", 0, 2), ("train", 1, 4), ("train", 2, 4)]
DROPPED = [{"file": "raw/a.jsonl", "row": 3, "reason": "empty", "detail": ""}]


def table(path: str, file: str, sequences: list[tuple[str, int, int]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    splits, numbers, rows = zip(*sequences, strict=True)
    writer = origins.Writer(Path(path), [], Path(path))
    indices = np.array([("train", "valid", "test").index(split) for split in splits])
    count = len(rows)
    writer.write(
        origins.Sequences(
            indices, np.array(numbers), [file] * count, np.array(rows), np.full(count, 4), [()] * count
        )
    )
    writer.close()


def shard(record: Callable[..., Path], name: str, sequences: list, counts: dict) -> Path:
    raw = Path(f"raw/{name}.jsonl")
    raw.parent.mkdir(exist_ok=True)
    raw.write_text("".join(f'{{"text": "{name} number {i}"}}\n' for i in range(1, 5)), encoding="utf-8")
    table(f"data/tokens/docs/{name}.parquet", str(raw), sequences)
    outputs = {
        "train.bin": f"data/tokens/docs/train/{name}.bin",
        "documents": f"data/tokens/docs/{name}.parquet",
    }
    Path("data/tokens/docs/train").mkdir(exist_ok=True)
    Path(outputs["train.bin"]).write_text(name, encoding="utf-8")
    place, settings = f"data/tokens/docs/{name}.json", {"corpus": "docs", "text_field": "text"}
    return record("tokens", f"docs/{name}", place, {"text": [of_user(raw)]}, outputs, settings, counts)


@pytest.fixture
def trained(work: Path, record, train) -> Path:
    """Two shards, a blend, its index, a training on it, a second one on other text, and SFT on the first."""
    shards = [
        shard(record, "a", SEQUENCES, {"dropped": {"empty": 1}, "dropped_rows": DROPPED}),
        shard(record, "b", [("train", 0, 1)], {}),
    ]
    Path("data/pretrain/one").mkdir(parents=True)
    blend = "data/pretrain/one/blend.json"
    Path(blend).write_text("{}", encoding="utf-8")
    record("blend", "one", "data/pretrain/one/record.json", {"records": shards}, {"blend.json": blend})
    save_index(Path("data/pretrain/one/index"), {A: ARRAYS, B: OTHER}, BLENDED)
    settings = {"seed": 7, "seq_length": 4, "train_samples": 8}
    outputs = {"index": "data/pretrain/one/index"}
    record("index", "one", "data/pretrain/one/index.json", {"blend": Path(blend)}, outputs, settings)
    train("pretrain/one", "0a", blend)
    train("pretrain/longer", "0b", blend, train_iters=9)
    Path("data/sft.json").write_text("[]", encoding="utf-8")
    record("blend_sft", "sft", "data/sft/record.json", {}, {"blend.json": "data/sft.json"})
    train("sft", "0c", "data/sft.json", base="pretrain/one-0a")
    return work


def look(*rows: int, file: str = "raw/a.jsonl") -> list[Fate]:
    catalogue = scan(Path.cwd())
    return fates(catalogue, source(catalogue, file), rows)


def test_the_samples_that_hold_a_sequence(trained: Path):
    order = SampleOrder(trained / "data/pretrain/one/index")
    # Shard a's sample 0 of the training is stream sample 1, and its sample 1 is stream sample 0.
    assert [order.samples(A, [n]).tolist() for n in (0, 1, 2)] == [[2, 5], [], [5]]
    assert order.samples(A, [0, 2]).tolist() == [2, 5]
    assert order.samples(B, [0]).tolist() == [0, 1, 3, 4, 6, 7]
    assert order.samples("another", [0]).tolist() == []


def test_the_steps_at_which_a_document_was_trained_on(trained: Path):
    """Two samples a step: sample 2 is of step 2, and sample 5 of step 3."""
    first, fourth = look(1, 4)
    one = next(t for t in first.trainings if t.made.record.name == "pretrain/one")
    assert (one.samples, one.steps, one.num_steps) == ([2, 5], [2, 3], 4)
    one = next(t for t in fourth.trainings if t.made.record.name == "pretrain/one")
    assert fourth.splits == ["train", "train"] and (one.samples, one.steps) == ([5], [3])


def test_a_shard_that_was_registered_is_trained_on_there_too(trained: Path, record, train):
    """A training on registered tokens was left out, and a removal said that it saw none of the document.

    Its stream has the shard's samples 1 and 0: sequence 0 is in both, sequence 2 in the second one.
    """
    prefix, blend = str(trained / A), "other/blend.json"
    settings = {"split": "train", "prefix": prefix}
    tokens = {"bin": [of_user(Path(f"{A}.bin"))]}
    registered = record("registered_tokens", "alt/a", "other/a.json", tokens, {}, settings)
    Path(blend).write_text("{ }", encoding="utf-8")
    record("blend", "two", "other/record.json", {"records": [registered]}, {"blend.json": blend})
    save_index(Path("other/index"), {prefix: ARRAYS}, ([0, 0], [0, 1]))
    settings = {"seed": 7, "seq_length": 4, "train_samples": 8}
    record("index", "two", "other/index.json", {"blend": Path(blend)}, {"index": "other/index"}, settings)
    train("pretrain/two", "0d", blend)
    for row, samples in ((1, [0, 1]), (4, [1])):
        (fate,) = look(row)
        two = next(t for t in fate.trainings if t.made.record.name == "pretrain/two")
        assert (two.samples, two.problem) == (samples, "")
    again = removal.removal(scan(trained), [("raw/a.jsonl", 4)]).again
    assert "pretrain/two-0d" in [made.version for made in again]


def test_copies_of_a_file_are_only_in_the_shards_that_read_them(trained: Path, record):
    """A second file has the content of the first, and the tokenizer has read a third one."""
    shard(record, "c", [("train", 0, 1)], {})
    for copy in ("raw/c.jsonl", "raw/d.jsonl"):
        shutil.copy("raw/a.jsonl", copy)
    tokenizer = Path("data/tokenizer/tokenizer.json")
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_text("{}", encoding="utf-8")
    made = {"tokenizer": str(tokenizer)}
    record("tokenizer", "", "data/tokenizer/record.json", {"text": [of_user(Path("raw/d.jsonl"))]}, made)
    settings = {"corpus": "docs", "text_field": "text"}
    outputs = {"train.bin": "data/tokens/docs/train/c.bin", "documents": "data/tokens/docs/c.parquet"}
    inputs = {"text": [of_user(Path("raw/c.jsonl"))], "tokenizer": tokenizer}
    record("tokens", "docs/c", "data/tokens/docs/c.json", inputs, outputs, settings)
    found = [(fate.file, fate.shard.record.name) for fate in look(1)]
    assert found == [("raw/a.jsonl", "docs/a"), ("raw/c.jsonl", "docs/c")]


def test_a_document_that_was_not_trained_on_says_why(trained: Path):
    held_out, dropped, beyond = look(2, 3, 99)
    assert (held_out.splits, held_out.why) == (["valid"], "held out for validation")
    assert dropped.why == "dropped: empty" and dropped.trainings == []
    assert (
        beyond.why == "dropped, or not in the file: the record of docs/a lists only the first of its 1 empty"
    )


def test_a_training_whose_index_is_gone_is_named(trained: Path, train):
    train("pretrain/ordered", "0d", "data/pretrain/one/blend.json", seed=1, data_seed=7)
    train("pretrain/other", "0e", "data/pretrain/one/blend.json", seed=7, data_seed=1)
    (fate,) = look(1)
    problems = {t.made.version: t.problem for t in fate.trainings}
    assert problems["pretrain/one-0a"] == problems["pretrain/ordered-0d"] == ""
    for gone in ("pretrain/longer-0b", "pretrain/other-0e"):
        assert problems[gone].startswith("the index that it read is not here any more")


def test_the_answer_in_words(trained: Path, record):
    Path("ckpt/versions/pretrain_longer-0b/record.json").unlink()
    tuned = {"checkpoint": Entry("checkpoint", "ckpt/sft", version="sft-0c")}
    record("evaluation", "sft", "eval/versions/sft-0f/record.json", tuned, {}, key="0f")
    catalogue = scan(trained)
    found = fates(catalogue, source(catalogue, "raw/a.jsonl"), [1, 2])
    assert words.told(catalogue, found) == [
        "raw/a.jsonl:1 in tokens docs/a",
        "  sequence 0 of train",
        "  pretrain/one-0a: at 2 of 4 steps: 2, 3",
        "  built on these: sft-0c, evaluation sft-0f",
        "raw/a.jsonl:2 in tokens docs/a",
        "  sequence 0 of valid",
        "  not trained on: held out for validation",
    ]


def test_a_document_is_found_by_its_text(trained: Path):
    catalogue = scan(trained)
    asked = source(catalogue, "raw/a.jsonl")
    assert rows_with(asked, "number 3") == [3]
    assert rows_with(asked, "a number") == [1, 2, 3, 4]
    with pytest.raises(UserError, match="no row has this text"):
        rows_with(asked, "number 5")
    Path("raw/a.jsonl").unlink()
    with pytest.raises(UserError, match="is not here any more, so it cannot be searched; give the number"):
        rows_with(source(scan(trained), "raw/a.jsonl"), "number 3")


# --------------------------------------------------------------------------------------------- removal


def without(*documents: tuple[str, int | None]) -> tuple[list[str], list[str]]:
    found = removal.removal(scan(Path.cwd()), documents)
    return [made.title for made in found.again], [made.version for made in found.unseen]


def test_what_is_made_again_without_a_document_that_was_trained_on(trained: Path):
    Path("ckpt/versions/pretrain_longer-0b/record.json").unlink()
    again = ["tokens docs/a", "blend one", "checkpoint pretrain/one", "index one", "checkpoint sft"]
    assert without(("raw/a.jsonl", 1)) == (again, [])
    assert without(("raw/a.jsonl", None)) == (again, [])
    found = removal.removal(scan(trained), [("raw/a.jsonl", 1)])
    assert removal.told(found)[-4:-1] == [
        "trainings, each from its beginning:",
        "  pretrain/one-0a: saw them at 2 of 4 steps: 2, 3",
        "  sft-0c: 4 steps, built on what saw them",
    ]
    assert removal.told(found)[-1].startswith("estimate: 8 training steps, 5 jobs that took 00:00:0")


def test_a_training_that_never_saw_it_need_not_be_made_again(trained: Path):
    Path("ckpt/versions/pretrain_longer-0b/record.json").unlink()
    assert without(("raw/a.jsonl", 2)) == (["tokens docs/a", "blend one", "index one"], ["pretrain/one-0a"])


def test_a_merged_checkpoint_is_made_again_when_what_it_is_merged_from_is(trained: Path, record):
    Path("ckpt/versions/pretrain_longer-0b/record.json").unlink()
    for name, base in (("merged", "pretrain/one-0a"), ("other", "pretrain/none-0d")):
        inputs = {
            "blend": Path("data/pretrain/one/blend.json"),
            "base": Entry("base", "ckpt/base", version=base),
            "adapters": Entry("adapters", "ckpt/lora", version="lora-0e"),
        }
        record("checkpoint", name, f"ckpt/versions/{name}-0f/record.json", inputs, {}, {}, {}, "0f")
    assert without(("raw/a.jsonl", 1))[0][-2:] == ["checkpoint merged", "checkpoint sft"]
    assert without(("raw/a.jsonl", 2)) == (["tokens docs/a", "blend one", "index one"], ["pretrain/one-0a"])


def test_a_training_of_which_nobody_knows_is_made_again(trained: Path):
    assert "checkpoint pretrain/longer" in without(("raw/a.jsonl", 2), ("raw/a.jsonl", 1))[0]


def test_nothing_is_made_again_without_a_dropped_document(trained: Path):
    assert without(("raw/a.jsonl", 3)) == ([], [])
    told = removal.told(removal.removal(scan(trained), [("raw/a.jsonl", 3)]))
    assert told == [
        "without 1 document",
        "  raw/a.jsonl:3 is not in tokens docs/a: dropped: empty",
        "nothing has to be made again",
    ]


def test_a_row_that_no_file_has_is_not_the_whole_file(trained: Path):
    """Rows are counted from 1."""
    assert without(("raw/a.jsonl", 0)) == ([], [])


def test_a_list_names_files_and_rows(work: Path):
    asked = work / "remove.txt"
    asked.write_text("raw/a.jsonl:3\n\nraw/b c.parquet: row 12\nraw/whole.jsonl\n")
    assert removal.requested(asked) == [
        ("raw/a.jsonl", 3),
        ("raw/b c.parquet", 12),
        ("raw/whole.jsonl", None),
    ]
    asked.write_text("\n")
    with pytest.raises(UserError, match="names no documents; write a line `FILE` or `FILE:ROW` for each"):
        removal.requested(asked)
    with pytest.raises(UserError, match=r"none\.txt: not a list of documents that can be read \(.*No such"):
        removal.requested(work / "none.txt")


# ---------------------------------------------------------------------------------------------- script


def test_the_script_answers(trained: Path, run_script):
    Path("remove.txt").write_text("raw/a.jsonl:1\nraw/b.jsonl\n", encoding="utf-8")
    for question in (
        ("--who-uses", "raw/a.jsonl"),
        ("--who-uses", "raw/a.jsonl", "--text", "number 3", "--format", "json"),
        ("--without", "remove.txt"),
        ("--without", "raw/a.jsonl", "--row", 1, 4, "--format", "json"),
    ):
        assert run_script("lineage", *question) == (0, "")
    status, message = run_script("lineage", "--who-uses", "raw/none.jsonl")
    assert status == 1 and message.startswith("error: raw/none.jsonl: no such file")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("ckpt/sft", "--who-uses", "raw/a.jsonl"),
        ("ckpt/sft", "--row", "1"),
        ("--who-uses", "raw/a.jsonl", "--verify"),
        ("ckpt/sft", "--all"),
        ("--without", "raw/a.jsonl", "--format", "mermaid"),
    ],
)
def test_questions_that_do_not_fit_together_are_refused(work: Path, run_script, arguments: tuple[str, ...]):
    assert run_script("lineage", *arguments)[0] == 2

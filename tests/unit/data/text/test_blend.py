"""A blend holds complete shards with tokens, weighed by them; anything else is an error, never a hole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.data.split import split_of
from snaketron.data.text import blend
from snaketron.lineage.record import Entry, making
from snaketron.log import UserError
from snaketron.settings.blends import PhaseSettings

import pytest

# Each digit is a token, and each document ends in one more.
SHARDS = {"docs": {"a": ["1"], "b": ["123", "4"]}, "code": {"a": ["1234567"]}}  # 2, 4 + 2 and 8 tokens


@pytest.fixture
def records(tokenize, tmp_path, write_jsonl) -> list[Path]:
    """Tokenized shards, all of it train."""
    made = []
    for corpus, shards in SHARDS.items():
        for shard, texts in shards.items():
            text = write_jsonl(tmp_path / corpus / f"{shard}.jsonl", [{"text": t} for t in texts])
            status, stderr, record = tokenize(text, corpus=corpus, valid=0.0, test=0.0)
            assert status == 0, stderr
            made.append(record)
    return made


def settings(*weights: str, splits: dict[str, str] | None = None) -> str:
    """The settings of a phase of 40 tokens, of weights such as docs=1."""
    given = dict(weight.split("=") for weight in weights)
    found = PhaseSettings(phase="broad", weights=given, splits=splits or {}, train_tokens=40)
    return found.model_dump_json()


@pytest.fixture
def build(run_script, tmp_path, tokenizer_dir) -> Callable[..., tuple[int, str]]:
    """Run blend_pretrain; returns exit status and standard error."""

    def run(
        records: list[Path],
        *weights: str,
        splits: dict[str, str] | None = None,
        tokenizer: Path = tokenizer_dir,
        max_epochs: float = 4,
    ) -> tuple[int, str]:
        return run_script(
            "blend_pretrain",
            *("--settings", settings(*weights, splits=splits), "--max-epochs", max_epochs),
            *("--records", *records, "--tokenizer", tokenizer),
            *("--output", tmp_path / "out" / "blend.json", "--record", tmp_path / "out" / "record.json"),
        )

    return run


def assert_refused(result: tuple[int, str], tmp_path: Path, *messages: str) -> None:
    status, stderr = result
    assert status == 1
    assert all(message in stderr for message in messages), stderr
    assert not [path for path in tmp_path.glob("out/**/*") if path.is_file()]


def test_a_corpus_weight_is_spread_over_its_shards_by_tokens(build, records, tmp_path, tokenizer_dir):
    status, stderr = build(records, "docs=1", "code=3")
    assert status == 0, stderr
    value = files.read_json(tmp_path / "out" / "blend.json")
    prefixes = [str(r.parent / "train" / r.stem) for r in records]
    assert value["train"]["prefixes"] == prefixes
    assert value["train"]["weights"] == [0.25 * 2 / 8, 0.25 * 6 / 8, 0.75]
    assert value["train"]["corpora"] == [
        {
            "corpus": "docs",
            "asked": 0.25,
            "share": 0.25,
            "present": 0.5,  # 8 of 16 tokens
            "documents": 3,
            "tokens": 8,
            "taken": 10,  # of 40
            "epochs": 1.25,
            "empty_shards": 0,
        },
        {
            "corpus": "code",
            "asked": 0.75,
            "share": 0.75,
            "present": 0.5,
            "documents": 1,
            "tokens": 8,
            "taken": 30,
            "epochs": 3.75,
            "empty_shards": 0,
        },
    ]
    assert (value["train"]["tokens"], value["train"]["documents"]) == (16, 4)
    assert value["tokenizer"] == files.sha256(tokenizer_dir / "tokenizer.json")
    assert (value["phase"], value["dtype"]) == ("broad", "uint16")
    assert value["train"]["shards"][2] == {
        "prefix": prefixes[2],
        "corpus": "code",
        "documents": 1,
        "tokens": 8,
        "bin_bytes": 16,
        "bin_sha256": files.sha256(Path(f"{prefixes[2]}.bin")),
        "idx_bytes": 34 + 12 + 16,
        "idx_sha256": files.sha256(Path(f"{prefixes[2]}.idx")),
    }
    record = files.read_json(tmp_path / "out" / "record.json")
    assert [i["path"] for i in record["inputs"][:3]] == [str(r) for r in records]
    assert record["counts"]["train"] == {"documents": 4, "tokens": 16}
    assert record["counts"]["repeated"] == {} and "goes through" not in stderr


def test_a_corpus_that_is_held_out_takes_no_share_of_the_training(
    build, records, tokenize, tmp_path, write_jsonl, caplog
):
    """Its weight counts among what is validated. Nobody is warned that it has nothing in the other splits."""
    caplog.set_level("INFO")
    notes = write_jsonl(tmp_path / "notes.jsonl", [{"text": "12"}, {"text": "3"}])  # 3 + 2 tokens
    _, _, held_out = tokenize(notes, corpus="notes", split="valid")
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": "1"}] * 5)  # 2 tokens each, half of their weight
    _, _, other = tokenize(more, corpus="more", split="valid")
    weights = ("docs=0.5", "code=0.5", "notes=1", "more=0.5")
    splits = {"notes": "valid", "more": "valid", "code": "train"}
    status, stderr = build([*records, held_out, other], *weights, splits=splits)
    assert status == 0, stderr
    value = files.read_json(tmp_path / "out" / "blend.json")

    def told(split: str, *keys: str) -> list[list[Any]]:
        return [[corpus[key] for key in keys] for corpus in value[split]["corpora"]]

    keys = ("corpus", "asked", "share", "tokens", "taken")
    assert told("train", *keys) == [["docs", 0.5, 0.5, 8, 20], ["code", 0.5, 0.5, 8, 20]]
    assert told("valid", "corpus", "asked", "tokens") == [["notes", 1.0, 5], ["more", 0.5, 10]]
    assert value["valid"]["weights"] == [1 / 1.5, 0.5 / 1.5]
    assert value["train"]["prefixes"] == [str(r.parent / "train" / r.stem) for r in records]
    assert value["valid"]["prefixes"] == [str(r.parent / "valid" / r.stem) for r in (held_out, other)]
    assert value["test"]["prefixes"] == []
    warned = [line.getMessage() for line in caplog.records if "has no tokens" in line.getMessage()]
    assert [line.partition(" has")[0] for line in warned] == ["valid: corpus docs", "test: corpus docs"]


def test_a_shard_of_another_split_than_its_corpus_is_refused(build, records, tokenize, tmp_path, write_jsonl):
    notes = write_jsonl(tmp_path / "notes.jsonl", [{"text": "12"}])
    _, _, record = tokenize(notes, corpus="notes", valid=0.0, test=0.0)
    weights, splits = ("docs=1", "code=1", "notes=1"), {"notes": "valid"}
    result = build([*records, record], *weights, splits=splits)
    said = "train/notes: has 1 documents in train, and corpus 'notes' is of split valid; remove its record"
    assert_refused(result, tmp_path, said)


def test_megatron_gets_none_for_a_split_without_tokens(build, records, tmp_path, caplog):
    caplog.set_level("INFO")
    build(records, "docs=1", "code=1")
    loaded = blend.load_blend(tmp_path / "out" / "blend.json")
    assert loaded.valid.prefixes == []
    train, valid, test = loaded.blend_per_split
    assert train == (loaded.train.prefixes, loaded.train.weights)
    assert (valid, test) == (None, None)
    assert "valid: corpus docs has no tokens and is left out: raise pretrain_data." in caplog.text


def test_a_corpus_or_shard_without_tokens_in_a_split_is_left_out_there(
    build, tokenize, tmp_path, write_jsonl, caplog
):
    numbers = [str(i) for i in range(10, 100)]  # 3 tokens each
    valid = [n for n in numbers if split_of(n, 0.5, 0.0) == "valid"]
    train = [n for n in numbers if split_of(n, 0.5, 0.0) == "train"]
    caplog.set_level("INFO")
    made = []
    for corpus, shard, texts in (
        ("docs", "a", [train[0], valid[0], valid[1]]),
        ("docs", "b", [train[1]]),
        ("code", "a", [train[2]]),
    ):
        text = write_jsonl(tmp_path / corpus / f"{shard}.jsonl", [{"text": t} for t in texts])
        made.append(tokenize(text, corpus=corpus, valid=0.5, test=0.0)[2])
    status, stderr = build(made, "docs=0.3", "code=0.7")
    assert status == 0, stderr
    loaded = blend.check_blend(tmp_path / "out" / "blend.json")
    assert loaded.train.weights == [0.15, 0.15, 0.7]
    assert loaded.valid.prefixes == [str(made[0].parent / "valid" / "a")]
    assert loaded.valid.weights == [1.0]
    (docs,) = loaded.valid.corpora
    assert (docs.corpus, docs.asked, docs.share, docs.present, docs.tokens) == ("docs", 0.3, 1.0, 1.0, 6)
    assert (docs.taken, docs.epochs, docs.empty_shards) == (None, None, 1)
    assert "corpus docs: 1 of its 2 shards have no tokens in valid: left out there" in caplog.text


def test_the_same_shards_give_the_same_bytes(build, records, tmp_path):
    build(records, "docs=1", "code=1")
    first = (tmp_path / "out" / "blend.json").read_bytes()
    build(records, "docs=1", "code=1")
    assert (tmp_path / "out" / "blend.json").read_bytes() == first


def test_a_record_given_twice_counts_once(build, records, tmp_path):
    build([*records, records[0]], "docs=1", "code=1")
    assert len(blend.load_blend(tmp_path / "out" / "blend.json").train.prefixes) == 3


def test_prefixes_stay_relative(build, records, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for record in records:
        value = files.read_json(record)
        for output in value["outputs"]:
            output["path"] = str(Path(output["path"]).relative_to(tmp_path))
        files.write_json(record, value)
    build(records, "docs=1", "code=1")
    assert blend.check_blend(Path("out/blend.json")).train.prefixes[0] == "tokens/docs/train/a"


def test_a_corpus_that_is_repeated_too_often_is_named_and_recorded(build, records, tmp_path):
    """40 tokens, a quarter of them of 8 and the rest of another 8: 1.25 and 3.75 epochs."""
    status, stderr = build(records, "docs=1", "code=3", max_epochs=3.5)
    assert status == 0
    assert (
        "phase broad goes through corpus code 3.75 times (it takes 30 tokens and there are 8), more than "
        "pretrain_data.max_epochs 3.5" in stderr
    )
    assert "corpus docs" not in stderr.split("goes through")[1]
    assert files.read_json(tmp_path / "out" / "record.json")["counts"]["repeated"] == {"code": 3.75}


def test_the_limit_of_repetition_does_not_change_the_blend(build, records, tmp_path):
    """A training is identified by its blend.json; another limit of a warning must not train again."""
    build(records, "docs=1", "code=3", max_epochs=1)
    first = (tmp_path / "out" / "blend.json").read_bytes()
    build(records, "docs=1", "code=3", max_epochs=100)
    assert (tmp_path / "out" / "blend.json").read_bytes() == first


def test_a_warning_reaches_the_terminal_and_the_log(build, records, tmp_path, tokenizer_dir, run_script):
    log = tmp_path / "blend.log"
    _, stderr = run_script(
        "blend_pretrain",
        *("--log-file", log, "--settings", settings("docs=1", "code=3")),
        *("--max-epochs", "3.5", "--records", *records, "--tokenizer", tokenizer_dir),
        *("--output", tmp_path / "out" / "blend.json", "--record", tmp_path / "out" / "record.json"),
    )
    assert "corpus code 3.75 times" in stderr and "corpus code 3.75 times" in log.read_text()
    assert "train: 3 shards" in log.read_text() and "train: 3 shards" not in stderr


# --------------------------------------------------------------------------------------- refusals


def test_a_missing_record_is_named(build, records, tmp_path):
    records[1].unlink()
    assert_refused(build(records, "docs=1", "code=1"), tmp_path, f"{records[1]}: no such record")


def test_a_record_of_something_else_is_named(build, records, tmp_path, tokenizer_dir):
    result = build([tokenizer_dir / "record.json"], "docs=1")
    assert_refused(result, tmp_path, "record.json: a record of tokenizer, not of a tokenized shard")


def test_a_corpus_without_a_record_is_named(build, records, tmp_path):
    assert_refused(
        build(records, "docs=1", "code=1", "web=2"), tmp_path, "no record of corpus 'web' (weight 2.0)"
    )


def test_a_record_without_a_weight_is_named(build, records, tmp_path):
    assert_refused(build(records, "docs=1"), tmp_path, "corpus 'code', which has no weight in phase 'broad'")


def test_a_missing_file_is_named(build, records, tmp_path):
    (records[0].parent / "valid" / "a.idx").unlink()
    assert_refused(
        build(records, "docs=1", "code=1"), tmp_path, "docs/valid/a.idx: no such file", "run again"
    )


def test_a_cut_file_is_named_with_both_sizes(build, records, tmp_path):
    path = records[2].parent / "train" / "a.bin"
    path.write_bytes(path.read_bytes()[:-2])
    result = build(records, "docs=1", "code=1")
    assert_refused(result, tmp_path, f"{path}: 14 bytes, and its record {records[2]} says 16", "run again")


def test_an_index_of_the_right_size_that_does_not_fit_is_named(build, records, tmp_path):
    path = records[1].parent / "train" / "b.idx"
    data = bytearray(path.read_bytes())
    data[34] = 5  # the first document had 4 tokens
    path.write_bytes(data)
    result = build(records, "docs=1", "code=1")
    assert_refused(result, tmp_path, "b.bin: 12 bytes, where b.idx promises 14")


def test_a_record_that_counts_differently_is_named(build, records, tmp_path):
    value = files.read_json(records[0])
    value["counts"]["train"]["tokens"] = 3
    records[0].write_text(json.dumps(value))
    result = build(records, "docs=1", "code=1")
    assert_refused(result, tmp_path, "a.idx: 2 tokens, its record", "says 3")


def test_shards_of_another_tokenizer_are_refused(build, records, tmp_path, tokenizer_dir):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes() + b"\n")
    result = build(records, "docs=1", "code=1", tokenizer=other)
    theirs, ours = (files.sha256(d / "tokenizer.json")[:12] for d in (tokenizer_dir, other))
    assert_refused(result, tmp_path, f"{records[0]}: tokenized with another tokenizer", theirs, ours)


def test_a_corpus_without_train_tokens_is_refused(build, tokenize, tmp_path, write_jsonl):
    text = next(t for t in map(str, range(100)) if split_of(t, 0.5, 0.0) == "valid")
    _, _, record = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": text}]), valid=0.5, test=0.0)
    assert_refused(build([record], "docs=1"), tmp_path, "corpus 'docs' has no tokens in train")


def empty_shard(record: Path, like: Path, dropped: dict[str, int]) -> Path:
    """A shard of 0 documents beside a record that is otherwise as `like`."""
    value = files.read_json(like)
    value["settings"]["corpus"] = record.parent.name
    value["counts"] |= {split: {"documents": 0, "tokens": 0} for split in ("train", "valid", "test")}
    value["counts"]["dropped"] = dropped
    value["counts"]["dropped_rows"] = [
        {"file": f"{record.stem}.jsonl", "row": 1, "reason": reason, "detail": ""} for reason in dropped
    ]
    value["outputs"] = []
    for split in ("train", "valid", "test"):
        prefix = record.parent / split / record.stem
        prefix.parent.mkdir(parents=True, exist_ok=True)
        index = struct.pack("<9sQBQQq", b"MMIDIDX\x00\x00", 1, 8, 0, 1, 0)
        for path, data in ((Path(f"{prefix}.bin"), b""), (Path(f"{prefix}.idx"), index)):
            path.write_bytes(data)
            output = {"path": str(path), "bytes": len(data), "sha256": files.sha256(path)}
            value["outputs"].append({"name": f"{split}{path.suffix}", **output})
    files.write_json(record, value)
    return record


def test_a_corpus_without_documents_says_what_became_of_them(build, records, tmp_path):
    web = [
        empty_shard(tmp_path / "web" / "a.json", records[0], {"empty": 1, "invalid text": 0}),
        empty_shard(tmp_path / "web" / "b.json", records[0], {"empty": 2, "filtered by where": 5}),
    ]
    assert_refused(
        build([*records, *web], "docs=1", "code=1", "web=1"),
        tmp_path,
        "phase 'broad': corpus 'web' has no documents in any of its 2 shards "
        "(dropped: 3 empty, 5 filtered by where)",
    )


def test_rows_that_shards_dropped_are_one_line_for_each_corpus(
    build: Callable[..., tuple[int, str]], tokenize: Any, tmp_path: Path, write_jsonl: Any
):
    """Shards of docs lost 3 of 9 rows; code lost one that its settings ask to drop, and says nothing."""
    texts = {
        "docs/a": ["1", "", "2"],
        "docs/b": ["1", "2"],
        "docs/c": ["", "3", "", "4"],
        "code/a": ["123", "4"],
    }
    made = []
    for name, of_shard in texts.items():
        corpus = name.partition("/")[0]
        text = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in of_shard])
        limit = {"long_documents": "drop", "max_document_tokens": 3} if corpus == "code" else {}
        status, stderr, record = tokenize(text, corpus=corpus, valid=0.0, test=0.0, **limit)
        assert status == 0, stderr
        made.append(record)
    status, stderr = build(made, "docs=1", "code=1")
    assert (status, [line for line in stderr.splitlines() if "dropped" in line]) == (
        0,
        [
            f"corpus docs: dropped 3 of 9 rows (3 x empty); the first is {tmp_path}/docs/a.jsonl:2: empty; "
            f"dropped_rows in {made[0].parent}/*.json lists them"
        ],
    )


def test_rows_that_curation_could_not_read_are_one_line_too(
    build: Callable[..., tuple[int, str]], records: list[Path], tmp_path: Path
):
    """The shards of docs are made of curated files; the second of these lost 2 of 5 rows."""
    for record, lost in zip(records[:2], ([], [3, 5]), strict=True):
        place = tmp_path / "curation" / f"{record.stem}.parquet"
        listed = [{"file": "web.jsonl", "row": row, "reason": "bad row", "detail": "no JSON"} for row in lost]
        counts = {"rows": 5, "dropped": {"bad row": len(lost)}, "dropped_rows": listed}
        made = made_of([], "filtered", place, counts)
        place = tmp_path / f"curated_{record.stem}.parquet"
        made = made_of([made.renamed("filtered")], "curated", place, {})
        make_from(record, made)
    status, stderr = build(records, "docs=1", "code=1")
    assert (status, [line for line in stderr.splitlines() if "dropped" in line]) == (
        0,
        [
            "corpus docs, curation: dropped 2 of 10 rows (2 x bad row); the first is web.jsonl:3: no JSON; "
            f"dropped_rows in {tmp_path}/curation/*.json lists them"
        ],
    )


def test_a_corpus_of_which_curation_left_nothing_says_why(build, records, tmp_path):
    """It said `dropped: nothing`, because the empty files that curation wrote have no rows to drop."""
    web = empty_shard(tmp_path / "web" / "a.json", records[0], {"empty": 0})
    removed = {"gopher_quality: gopher_short_doc": {"documents": 6}, "near duplicate": {"documents": 94}}
    place = tmp_path / "curated" / "a.parquet"
    counts = {"dropped": {"filtered by where": 3}, "removed": removed}
    make_from(web, made_of([], "curated", place, counts))
    assert_refused(
        build([*records, web], "docs=1", "code=1", "web=1"),
        tmp_path,
        "corpus 'web' has no documents in any of its 1 shards "
        "(dropped: 3 filtered by where, 6 gopher_quality: gopher_short_doc, 94 near duplicate)",
    )


def make_from(record: Path, text: Entry) -> None:
    """Let the record of a shard say that it was made from a file."""
    value = files.read_json(record)
    value["inputs"] = [{"name": "text", **text.reference}]
    files.write_json(record, value)


def made_of(inputs: list[Entry], kind: Any, path: Path, counts: dict[str, Any]) -> Entry:
    """A file that a rule made, with its record beside it."""
    with making(kind, path.stem, outputs={"documents": path}, record=path.with_suffix(".json")) as job:
        job.aside["documents"].write_bytes(f"{path}".encode())
        job.inputs, job.counts = {entry.name: entry for entry in inputs}, counts
    return job.record.output("documents")


def test_a_shard_without_documents_is_counted_and_left_out(build, records, tmp_path, caplog):
    caplog.set_level("INFO")
    empty = empty_shard(tmp_path / "docs2" / "c.json", records[0], {"empty": 1})
    value = files.read_json(empty)
    value["settings"]["corpus"] = "docs"
    files.write_json(empty, value)
    status, stderr = build([*records, empty], "docs=1", "code=1")
    assert status == 0, stderr
    train = blend.load_blend(tmp_path / "out" / "blend.json").train
    assert len(train.prefixes) == 3 and train.corpora[0].empty_shards == 1
    assert "corpus docs: 1 of its 3 shards have no tokens in train: left out there" in caplog.text


def test_more_shards_than_megatron_can_number_are_refused():
    shards = [blend.Shard(f"s{i}", "docs", 1, 2, 4, "", 66, "") for i in range(32767)]
    blend._check_weights("broad", {"docs": 1}, {"train": shards[1:]}, {})
    with pytest.raises(UserError, match="32767 shards with tokens in train, where megatron-core takes 32766"):
        blend._check_weights("broad", {"docs": 1}, {"train": shards}, {})


# ---------------------------------------------------------------------------------------- reading


def test_check_sees_a_shard_that_changed_since(build, records, tmp_path):
    build(records, "docs=1", "code=1")
    path = tmp_path / "out" / "blend.json"
    assert blend.check_blend(path) == blend.load_blend(path)
    (records[2].parent / "train" / "a.bin").write_bytes(bytes(4))
    with pytest.raises(UserError, match=rf"a.bin: 4 bytes, and {path} says 16"):
        blend.check_blend(path)
    (records[2].parent / "train" / "a.bin").unlink()
    with pytest.raises(UserError, match=r"a.bin: no such file"):
        blend.check_blend(path)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"train": {}, "valid": {}, "test": {}}'])
def test_a_file_that_is_no_blend(tmp_path, content: Any):
    path = tmp_path / "blend.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"blend.json: (no such file|not a blend)"):
        blend.load_blend(path)

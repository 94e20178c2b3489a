"""One raw file becomes three .bin/.idx pairs that Megatron reads back, or nothing at all."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

from snaketron import files
from snaketron.config.data import SPLITS
from snaketron.data.split import split_of
from snaketron.data.text import binidx
from snaketron.data.text.reading import Reader
from snaketron.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, tokenizer_info
from snaketron.log import UserError
from snaketron.settings.text import TokenizeSettings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

SCRIPT = Path(__file__).parents[4] / "scripts" / "tokenize_shard.py"
TEXTS = [f"document {i}: the quick brown fox {'jumps ' * i}" for i in range(40)]


def sequences(record: Path, split: str) -> list[list[int]]:
    """What Megatron reads of a split."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # 3 s, for the tests that read

    prefix = record.parent / split / record.stem
    if not prefix.with_suffix(".bin").stat().st_size:
        return []
    return [[int(i) for i in sequence] for sequence in IndexedDataset(str(prefix))]


def test_megatron_reads_each_document_with_its_end(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    status, stderr, record = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS]))
    assert status == 0, stderr
    tokenizer = load_tokenizer(tokenizer_dir)
    for split in SPLITS:
        expected = [t for t in TEXTS if split_of(t, 0.2, 0.2) == split]
        read = sequences(record, split)
        assert expected and [tokenizer.decode(ids[:-1]) for ids in read] == expected  # in the file's order
        assert all(ids[-1] == tokenizer_info(tokenizer_dir).eos_id for ids in read)
        assert files.read_json(record)["counts"][split] == {
            "documents": len(expected),
            "tokens": sum(map(len, read)),
            "bytes": sum(map(len, expected)),
        }


def test_the_record_says_what_went_in_and_what_was_dropped(
    tokenize, tmp_path, tokenizer_dir, write_jsonl, caplog
):
    caplog.set_level(logging.INFO)
    texts = ["a", "", "é", ""]
    path = write_jsonl(tmp_path / "part.v2.jsonl", [{"body": t} for t in texts])
    status, stderr, record = tokenize(path, text_field="body", valid=0.0, test=0.0)
    assert status == 0, stderr
    assert "4 documents, 2 dropped" in caplog.text
    value = files.read_json(record)
    identity = files.sha256(tokenizer_dir / "tokenizer.json")
    assert value["counts"]["documents"] == 4
    assert value["counts"]["bytes"] == 3  # é is two bytes
    assert value["counts"]["dropped"] == {"empty": 2}
    assert value["counts"]["valid"] == {"documents": 0, "tokens": 0, "bytes": 0}
    state = {"bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
    assert value["inputs"][0] == {"name": "text", "path": str(path), "sha256": files.sha256(path)} | state
    settings = TokenizeSettings(corpus="docs", text_field="body", valid_fraction=0.0, test_fraction=0.0)
    assert value["settings"] == settings.model_dump() | {
        "shard": "part",
        "tokenizer": identity,
        "dtype": "uint16",
        "end_of_document": 0,
    }
    root = record.parent
    expected = [root / split / f"part.{kind}" for split in SPLITS for kind in ("bin", "idx")]
    expected.append(root / "part.parquet")
    assert [o["path"] for o in value["outputs"]] == [str(path) for path in expected]
    assert all(o["sha256"] == files.sha256(Path(o["path"])) for o in value["outputs"])
    assert sorted(root.rglob("*.*")) == sorted([*expected, record])  # and nothing else


def test_an_empty_split_is_a_pair_without_sequences(tokenize, tmp_path, write_jsonl):
    _, _, record = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), valid=0.0, test=0.0)
    pair = binidx.check(record.parent / "test" / "a")
    assert (pair.sequences, pair.tokens, pair.bin_bytes, pair.idx_bytes) == (0, 0, 0, 42)


def test_the_same_text_is_in_the_same_split_in_every_corpus_and_shard(tokenize, tmp_path, write_jsonl):
    rows = [{"text": t} for t in TEXTS]
    _, _, first = tokenize(write_jsonl(tmp_path / "a.jsonl", rows), corpus="docs")
    _, _, second = tokenize(write_jsonl(tmp_path / "b.jsonl", [*rows[20:], *rows]), corpus="code")
    for split in SPLITS:
        assert {*map(tuple, sequences(first, split))} == {*map(tuple, sequences(second, split))}
        assert len(sequences(second, split)) >= len(sequences(first, split))  # duplicates stay


def test_two_runs_write_the_same_bytes(tokenize, tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    _, _, record = tokenize(path)
    first = [o["sha256"] for o in files.read_json(record)["outputs"]]
    _, _, record = tokenize(path)
    assert [o["sha256"] for o in files.read_json(record)["outputs"]] == first


def test_control_tokens_in_a_document_stay_text(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    text = "a <|im_end|> b <|endoftext|> c"
    _, _, record = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": text}]), valid=0.0, test=0.0)
    (ids,) = sequences(record, "train")
    assert load_tokenizer(tokenizer_dir).decode(ids[:-1]) == text
    assert [i for i in ids if i < len(SPECIAL_TOKENS)] == [0]  # the end of the document


def test_truncation_in_the_tokenizer_file_is_ignored(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    copy = tmp_path / "tokenizer"
    copy.mkdir()
    (copy / "tokenizer_config.json").write_bytes((tokenizer_dir / "tokenizer_config.json").read_bytes())
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(copy / "tokenizer.json"))
    rows = [{"text": "one two three four five six"}]
    _, _, record = tokenize(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer=copy, valid=0.0, test=0.0)
    (ids,) = sequences(record, "train")
    assert tokenizer.decode(ids[:-1]) == "one two three four five six"


def test_a_vocabulary_over_65536_is_written_as_int32(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    copy = tmp_path / "tokenizer"
    copy.mkdir()
    (copy / "tokenizer_config.json").write_bytes((tokenizer_dir / "tokenizer_config.json").read_bytes())
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.add_tokens([f"token{i}" for i in range(65537 - tokenizer.get_vocab_size())])
    tokenizer.save(str(copy / "tokenizer.json"))
    last = f"token{65536 - 300}"
    _, _, record = tokenize(
        write_jsonl(tmp_path / "a.jsonl", [{"text": last}]), tokenizer=copy, valid=0.0, test=0.0
    )
    assert files.read_json(record)["settings"]["dtype"] == "int32"
    assert sequences(record, "train") == [[65536, 0]]


def test_fractions_that_leave_nothing_for_train_are_refused(tokenize, tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    status, stderr, _ = tokenize(path, valid=0.5, test=0.5)
    assert (status, "valid_fraction 0.5 + test_fraction 0.5" in stderr) == (1, True)


def test_a_missing_tokenizer_is_named(tokenize, tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    status, stderr, _ = tokenize(path, tokenizer=tmp_path / "none")
    assert (status, "none/tokenizer.json: no such file" in stderr) == (1, True)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, tokenizer_dir, write_jsonl):
    def full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail with EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    text = write_jsonl(tmp_path / "a.jsonl", ({"text": f"{i} {'words ' * 100}"} for i in range(3000)))
    root = tmp_path / "tokens"
    command = [
        *(sys.executable, SCRIPT, "--text", text, "--tokenizer", tokenizer_dir, "--settings"),
        '{"corpus": "docs", "text_field": "text", "valid_fraction": 0.1, "test_fraction": 0.1}',
        *("--bins", *(root / split / "a.bin" for split in SPLITS)),
        *("--documents", root / "a.parquet", "--record", root / "a.json"),
    ]
    # A module that is compiled under the limit would be left cut off, in the cache of all later processes.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, preexec_fn=full_disk, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {root}/train/a.bin: file too large"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert [path for path in root.rglob("*") if path.is_file()] == []


# ------------------------------------------------------------------------------------- which documents


def texts_of(record: Path, tokenizer_dir: Path, split: str = "train") -> list[str]:
    tokenizer = load_tokenizer(tokenizer_dir)
    return [tokenizer.decode(ids[:-1]) for ids in sequences(record, split)]


def table_of(record: Path) -> list[dict]:
    return pq.read_table(record.with_suffix(".parquet")).to_pylist()


def test_the_files_of_a_shard_follow_each_other(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ""}, {"text": "two"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "three"}])
    _, _, record = tokenize(first, second, valid=0.0, test=0.0)
    assert texts_of(record, tokenizer_dir) == ["one", "two", "three"]
    found = [(row["sequence"], row["file"], row["row"]) for row in table_of(record)]
    assert found == [(0, str(first), 1), (1, str(first), 3), (2, str(second), 1)]
    inputs = [entry["path"] for entry in files.read_json(record)["inputs"]]
    assert inputs == [str(first), str(second), str(tokenizer_dir / "tokenizer.json")]


def test_each_sequence_says_where_it_comes_from(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    rows = [{"text": text, "id": i, "url": f"u{i}" if i % 2 else None} for i, text in enumerate(TEXTS)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    _, _, record = tokenize(path, metadata_fields=["url", "id"])
    table = table_of(record)
    assert [row["row"] for row in table] == list(range(1, 41))  # in the order of the file
    decode = load_tokenizer(tokenizer_dir).decode
    for row in table:
        ids = sequences(record, row["split"])[row["sequence"]]
        text = TEXTS[row["row"] - 1]
        assert (decode(ids[:-1]), len(ids), split_of(text, 0.2, 0.2)) == (text, row["tokens"], row["split"])
        assert (row["url"], row["id"]) == (rows[row["row"] - 1]["url"], str(row["row"] - 1))


def test_a_metadata_field_that_no_row_has_is_told(tokenize, tmp_path, write_jsonl, caplog):
    status, _, record = tokenize(
        write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), metadata_fields=["ulr"], valid=0.0, test=0.0
    )
    assert "a.jsonl: no row has the metadata field 'ulr'" in caplog.text
    assert (status, table_of(record)[0]["ulr"]) == (0, None)


def test_a_metadata_field_must_not_be_one_of_ours(tokenize, tmp_path, write_jsonl):
    status, stderr, _ = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), metadata_fields=["file"])
    assert (status, "metadata_fields: 'file' is a column of a.parquet itself" in stderr) == (1, True)


def test_curated_documents_keep_their_origin(tokenize, tmp_path, tokenizer_dir):
    schema = pa.schema(
        [("text", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("url", pa.string())],
        {b"snaketron": b'{"kind": "curated"}'},
    )
    columns = [["one", "two"], ["raw/x.jsonl", "raw/y.jsonl"], [7, 9], ["u", None]]
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table(columns, schema=schema), path)
    _, _, record = tokenize(path, valid=0.0, test=0.0, metadata_fields=["url"])
    assert texts_of(record, tokenizer_dir) == ["one", "two"]
    found = [(row["file"], row["row"], row["url"]) for row in table_of(record)]
    assert found == [("raw/x.jsonl", 7, "u"), ("raw/y.jsonl", 9, None)]
    pq.write_table(schema.empty_table(), path)  # curation removed every document
    status, _, record = tokenize(path)
    assert (status, files.read_json(record)["counts"]["documents"]) == (0, 0)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"before {i}"} for i in range(3)])
    settings = TokenizeSettings(corpus="docs", text_field="text", valid_fraction=0, test_fraction=0)
    reader = Reader([path], settings)
    documents = reader.documents()
    assert next(documents).text == "before 0"
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": "after"}])
    other.replace(path)
    assert [document.text for document in documents] == ["before 1", "before 2"]
    # Else the record would say that these documents are those of the file that has replaced it.
    with pytest.raises(UserError, match=r"a\.jsonl: was changed while it was read; run again"):
        list(reader.read.entries())


def test_bad_rows_are_counted_in_the_record(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}, {"text": None}, {"text": "a\ud800"}])
    status, stderr, record = tokenize(path, bad_rows="drop", invalid_text="drop", valid=0.0, test=0.0)
    assert (status, "2 of 3 rows are bad or invalid, more than max_dropped_fraction 0.01" in stderr) == (
        1,
        True,
    )
    policy = {"bad_rows": "drop", "invalid_text": "drop", "max_dropped_fraction": 0.7}
    _, _, record = tokenize(path, valid=0.0, test=0.0, **policy)
    counts = files.read_json(record)["counts"]
    assert (counts["documents"], counts["kept"]) == (3, 1)
    assert counts["dropped"] == {"bad row": 1, "invalid text": 1}
    assert counts["dropped_rows"] == [
        {"file": str(path), "row": 2, "reason": "bad row", "detail": "field 'text' is null, not text"},
        {"file": str(path), "row": 3, "reason": "invalid text", "detail": "a lone surrogate"},
    ]
    assert texts_of(record, tokenizer_dir) == ["good"]


def test_a_filter_that_leaves_nothing_is_told(tokenize, tmp_path, write_jsonl, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "lang": "en"}])
    status, _, record = tokenize(path, where={"lang": ["de"]})
    assert (status, files.read_json(record)["counts"]["dropped"]) == (0, {"filtered by where": 1})
    assert "none of its 1 rows is used (1 filtered by where)" in caplog.text


LONG = {"valid": 0.0, "test": 0.0, "max_document_tokens": 4}


def ids_of(tokenizer_dir: Path, text: str) -> list[int]:
    return load_tokenizer(tokenizer_dir).encode(text).ids


def test_a_long_document_is_cut_into_pieces_that_each_end(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    """Room for 3 tokens and the end: 7 letters become 3 + 3 + 1, 6 become 3 + 3, 3 stay."""
    texts = ["zzzzzzz", "qqq", "kkkkkk"]
    _, _, record = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), **LONG)
    z, q, k = (ids_of(tokenizer_dir, letter)[0] for letter in "zqk")
    assert (
        sequences(record, "train") == [[z, z, z, 0], [z, z, z, 0], [z, 0], [q, q, q, 0]] + [[k, k, k, 0]] * 2
    )
    counts = files.read_json(record)["counts"]
    assert (counts["kept"], counts["cut"], counts["train"]["documents"]) == (3, 2, 6)
    assert counts["length_histogram"] == {"2": 1, "4": 5}
    assert [(row["row"], row["tokens"]) for row in table_of(record)] == [
        (1, 4), (1, 4), (1, 2), (2, 4), (3, 4), (3, 4),
    ]  # fmt: skip


def test_the_pieces_of_a_document_are_in_its_split(tokenize, tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    _, _, record = tokenize(path, max_document_tokens=8)
    for row in table_of(record):
        assert row["split"] == split_of(TEXTS[row["row"] - 1], 0.2, 0.2)


def test_a_long_document_is_dropped_where_the_settings_say_so(tokenize, tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "zzzz"}, {"text": "zzz"}])
    _, _, record = tokenize(path, **LONG, long_documents="drop")
    counts = files.read_json(record)["counts"]
    assert (counts["dropped"], counts["cut"], counts["train"]["tokens"]) == ({"too long": 1}, 0, 4)
    assert counts["dropped_rows"][0] | {"file": ""} == {
        "file": "", "row": 1, "reason": "too long", "detail": "5 tokens",
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_so_many_documents_are_taken_and_no_file_is_read_after_them(
    tokenize, tmp_path, tokenizer_dir, write_jsonl, monkeypatch, batch
):
    monkeypatch.setattr("snaketron.data.text.reading.BATCH_DOCUMENTS", batch)
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("one", "", "two", "three")])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "four"}, {"text": "five"}])
    damaged = tmp_path / "c.jsonl"
    damaged.write_text("{")
    _, _, record = tokenize(first, second, damaged, max_documents=4, valid=0.0, test=0.0)
    assert texts_of(record, tokenizer_dir) == ["one", "two", "three", "four"]
    value = files.read_json(record)
    assert (value["counts"]["documents"], value["counts"]["dropped"]) == (5, {"empty": 1})
    assert [entry["path"] for entry in value["inputs"][:-1]] == [str(first), str(second)]


@pytest.mark.parametrize(("limit", "kept"), [(9, ["zzz", "qqq"]), (8, ["zzz", "qqq"]), (7, ["zzz"])])
def test_whole_documents_are_taken_up_to_so_many_tokens(
    tokenize, tmp_path, tokenizer_dir, write_jsonl, limit, kept
):
    """Two documents of 3 + 1 tokens; the third, of 4 + 1, and what follows it are too much."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("zzz", "qqq", "kkkk", "z")])
    _, _, record = tokenize(path, max_tokens=limit, valid=0.0, test=0.0)
    assert texts_of(record, tokenizer_dir) == kept
    counts = files.read_json(record)["counts"]
    assert counts["documents"] == counts["kept"] + counts["dropped"]["after the limit"] == 4


def test_a_limit_that_no_document_keeps_is_an_error(tokenize, tmp_path, write_jsonl):
    status, stderr, _ = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": "zzz"}]), max_tokens=3)
    assert (status, "none of its 1 rows is used (1 after the limit)" in stderr) == (1, True)


def test_a_shuffled_shard_holds_the_same_documents_in_another_order(
    tokenize, tmp_path, tokenizer_dir, write_jsonl, monkeypatch
):
    monkeypatch.setattr("snaketron.data.text.origins._ROW_GROUP", 7)
    monkeypatch.setattr("snaketron.data.text.reading.BATCH_DOCUMENTS", 5)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS])
    orders = []
    for corpus, settings in {
        "kept": {},
        "one": {"document_order": "shuffled", "seed": 1},
        "again": {"document_order": "shuffled", "seed": 1, "threads": 2},
        "two": {"document_order": "shuffled", "seed": 2},
    }.items():
        _, _, record = tokenize(path, corpus=corpus, max_document_tokens=30, **settings)
        orders.append([tuple(ids) for ids in sequences(record, "train")])
        for row in table_of(record):  # each row still says where its sequence is
            ids = sequences(record, row["split"])[row["sequence"]]
            piece = load_tokenizer(tokenizer_dir).decode(ids[:-1])
            assert piece in TEXTS[row["row"] - 1] and len(ids) == row["tokens"]
        assert [row["row"] for row in table_of(record)] == sorted(row["row"] for row in table_of(record))
    kept, one, again, two = orders
    assert one == again != two and sorted(one) == sorted(kept) == sorted(two) and one != kept
    joined = [ids for sequence in one for ids in sequence]  # the pieces of a document stay together
    whole = next(ids_of(tokenizer_dir, t) for t in TEXTS[35:] if split_of(t, 0.2, 0.2) == "train")
    pieces = [i for n in range(0, len(whole), 29) for i in (*whole[n : n + 29], 0)]
    assert any(joined[n : n + len(pieces)] == pieces for n in range(len(joined)))


def test_the_number_of_threads_changes_no_byte(tokenize, tmp_path, write_jsonl, monkeypatch):
    monkeypatch.setattr("snaketron.data.text.reading.BATCH_DOCUMENTS", 3)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in (*TEXTS, "", *TEXTS)])
    outputs = []
    for threads in (1, 3):
        _, _, record = tokenize(path, threads=threads)
        value = files.read_json(record)
        outputs.append(([entry["sha256"] for entry in value["outputs"]], value["counts"]))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_the_files_are_those_of_datatrove(tokenize, tmp_path, tokenizer_dir, write_jsonl, monkeypatch, block):
    monkeypatch.setattr("snaketron.data.text.binidx._BLOCK", block)  # of sequences in the .idx at a time
    texts = [t for t in TEXTS if split_of(t, 0.2, 0.2) == "train"]
    _, _, record = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS]))
    theirs = MegatronTokenizedFile(str(tmp_path / "theirs"), "a", token_size=2)
    for text in texts:
        theirs.write([*ids_of(tokenizer_dir, text), 0])
    theirs.close()
    for kind in ("bin", "idx"):
        ours = (record.parent / f"train/a.{kind}").read_bytes()
        assert ours == (tmp_path / f"theirs/a.{kind}").read_bytes()


# ---------------------------------------------------------------------------------- binidx.check


def write_pair(
    prefix: Path, lengths: list[int], *, documents: list[int] | None = None, code: int = 8
) -> Path:
    """A pair of sequences of zeros, with the .idx as the format says."""
    offsets = np.cumsum([0, *lengths])[:-1] * 2
    bounds = list(range(len(lengths) + 1)) if documents is None else documents
    prefix.with_suffix(".bin").write_bytes(bytes(2 * sum(lengths)))
    header = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + code.to_bytes(1, "little")
    header += len(lengths).to_bytes(8, "little") + len(bounds).to_bytes(8, "little")
    arrays = np.array(lengths, np.int32), np.array(offsets, np.int64), np.array(bounds, np.int64)
    prefix.with_suffix(".idx").write_bytes(header + b"".join(a.tobytes() for a in arrays))
    return prefix


def test_a_complete_pair_is_described(tmp_path):
    assert binidx.check(write_pair(tmp_path / "a", [3, 1])) == binidx.Pair("uint16", 2, 4, 8, 34 + 24 + 24)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.with_suffix(".bin").unlink(), "a.bin: no such file"),
        (lambda p: p.with_suffix(".idx").unlink(), "a.idx: no such file"),
        (lambda p: p.with_suffix(".bin").write_bytes(bytes(6)), "a.bin: 6 bytes, where a.idx promises 8"),
        (
            lambda p: p.with_suffix(".idx").write_bytes(b"MMID"),
            "a.idx: 4 bytes, shorter than the header of 34",
        ),
        (lambda p: p.with_suffix(".idx").write_bytes(bytes(82)), "a.idx: not an index of token ids"),
        (
            lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-8]),
            "a.idx: 2 sequences and 2 documents in 74 bytes, where one document a sequence takes 82",
        ),
        (lambda p: write_pair(p, [3, 1], code=4), "a.bin: 8 bytes, where a.idx promises 16"),
        (lambda p: write_pair(p, [3, 1], documents=[0, 2]), "a.idx: 2 sequences and 1 documents"),
        (
            lambda p: write_pair(p, [3, 1], documents=[0, 2, 2]),
            "a.idx: its 2 documents are not one sequence each",
        ),
        (lambda p: write_pair(p, [4, 0]), "a.idx: its offsets do not follow from its 2 lengths"),
    ],
)
def test_a_damaged_pair_is_an_error_with_both_numbers(tmp_path, damage, message):
    prefix = write_pair(tmp_path / "a", [3, 1])
    damage(prefix)
    with pytest.raises(UserError) as error:
        binidx.check(prefix, "make it again")
    assert message in str(error.value) and "; make it again" in str(error.value)

"""The documents of a shard: those of its raw files, whole or in pieces, and where each comes from."""

from __future__ import annotations

from snaketron import files
from snaketron.data.split import split_of
from snaketron.data.text.reading import Reader
from snaketron.data.tokenizer import load_tokenizer
from snaketron.log import UserError
from snaketron.settings.text import TokenizeSettings
from tests.unit.data.text.reading_back import TEXTS, ids_of, sequences, table_of, texts_of

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


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
    assert (
        status,
        "2 of 3 rows are bad or invalid, more than pretrain_data.max_dropped_fraction 0.01" in stderr,
    ) == (
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
    assert "none of its 1 rows is used (1 filtered by where): the first because lang is 'en'" in caplog.text


@pytest.mark.parametrize(
    ("texts", "policy", "dropped"),
    [
        (["", ""], {}, {"empty": 2}),
        (["zzzzz"], {"max_document_tokens": 4, "long_documents": "drop"}, {"too long": 1}),
        ([None, ""], {"bad_rows": "drop", "max_dropped_fraction": 0.5}, {"bad row": 1, "empty": 1}),
    ],
)
def test_a_shard_of_which_nothing_is_left_is_told_and_no_error(
    tokenize, tmp_path, write_jsonl, caplog, texts, policy, dropped
):
    """One of thousands ended the run. The blend counts it, and refuses a corpus that has no others."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    status, stderr, record = tokenize(path, **policy)
    assert status == 0, stderr
    counts = files.read_json(record)["counts"]
    assert (counts["kept"], counts["dropped"]) == (0, dropped)
    assert [counts[split]["documents"] for split in ("train", "valid", "test")] == [0, 0, 0]
    assert f"{path}: none of its {len(texts)} rows is used" in caplog.text


LONG = {"valid": 0.0, "test": 0.0, "max_document_tokens": 4}


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
    expected = "none of its 1 rows is used (1 after the limit); raise max_tokens\n"
    assert status == 1 and expected in stderr, stderr


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

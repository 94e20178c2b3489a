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
from snaketron.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, tokenizer_info
from snaketron.settings.text import TokenizeSettings
from snaketron.sources.pairs import paths
from tests.unit.data.text.reading_back import TEXTS, ids_of, sequences

import pytest
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

SCRIPT = Path(__file__).parents[4] / "scripts" / "tokenize_shard.py"


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
    empty = record.parent / "test" / "a"
    assert binidx.check(empty, "") == binidx.Pair("uint16", 0, 0)
    assert [path.stat().st_size for path in paths(empty)] == [0, 42]


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


@pytest.mark.parametrize("split", SPLITS)
def test_all_documents_are_of_the_split_of_their_corpus(tokenize, tmp_path, write_jsonl, split: str):
    raw = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(10, 100)])
    status, stderr, record = tokenize(raw, split=split)  # a fifth would be valid, and a fifth test
    assert status == 0, stderr
    counts = files.read_json(record)["counts"]
    expected = {name: 90 if name == split else 0 for name in SPLITS}
    assert {name: counts[name]["documents"] for name in SPLITS} == expected
    assert {name: binidx.check(record.parent / name / "a", "").sequences for name in SPLITS} == expected


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

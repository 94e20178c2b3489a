"""One raw file becomes three .bin/.idx pairs that Megatron reads back, or nothing at all."""

from __future__ import annotations

import logging
import resource
import signal
import subprocess
import sys
from pathlib import Path

from snaketron import files
from snaketron.data import binidx
from snaketron.data import tokenizer as tokenizers
from snaketron.data.split import SPLITS, split_of
from snaketron.log import UserError

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

SCRIPT = Path(__file__).parents[3] / "scripts" / "tokenize_shard.py"
TEXTS = [f"document {i}: the quick brown fox {'jumps ' * i}" for i in range(40)]


def sequences(record: Path, split: str) -> list[list[int]]:
    """What Megatron reads of a split."""
    prefix = record.parent / split / record.stem
    if not prefix.with_suffix(".bin").stat().st_size:
        return []
    return [[int(i) for i in sequence] for sequence in IndexedDataset(str(prefix))]


def test_megatron_reads_each_document_with_its_end(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    status, stderr, record = tokenize(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in TEXTS]))
    assert status == 0, stderr
    tokenizer = tokenizers.load(tokenizer_dir)
    for split in SPLITS:
        expected = [t for t in TEXTS if split_of(t, 0.2, 0.2) == split]
        read = sequences(record, split)
        assert expected and [tokenizer.decode(ids[:-1]) for ids in read] == expected  # in the file's order
        assert all(ids[-1] == tokenizers.info(tokenizer_dir).eos_id for ids in read)
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
    assert value["counts"]["dropped"] == {"empty": 2, "no_tokens": 0}
    assert value["counts"]["valid"] == {"documents": 0, "tokens": 0, "bytes": 0}
    assert value["inputs"][0] == {"path": str(path), "sha256": files.sha256(path)}
    assert value["settings"] == {
        "corpus": "docs",
        "shard": "part",
        "text_field": "body",
        "valid_fraction": 0.0,
        "test_fraction": 0.0,
        "tokenizer": identity,
        "dtype": "uint16",
        "end_of_document": 0,
    }
    root = record.parent
    expected = [root / split / f"part.{kind}" for split in SPLITS for kind in ("bin", "idx")]
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
    assert tokenizers.load(tokenizer_dir).decode(ids[:-1]) == text
    assert [i for i in ids if i < len(tokenizers.SPECIAL_TOKENS)] == [0]  # the end of the document


def test_truncation_in_the_tokenizer_file_is_ignored(tokenize, tmp_path, tokenizer_dir, write_jsonl):
    copy = tmp_path / "tokenizer"
    copy.mkdir()
    (copy / "tokenizer_config.json").write_bytes((tokenizer_dir / "tokenizer_config.json").read_bytes())
    tokenizer = tokenizers.load(tokenizer_dir)
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
    tokenizer = tokenizers.load(tokenizer_dir)
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
        *(sys.executable, SCRIPT, "--text", text, "--text-field", "text", "--corpus", "docs"),
        *("--tokenizer", tokenizer_dir, "--valid-fraction", "0.1", "--test-fraction", "0.1"),
        *("--bins", *(root / split / "a.bin" for split in SPLITS), "--record", root / "a.json"),
    ]
    done = subprocess.run(command, preexec_fn=full_disk, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write {root}/train/a.bin: file too large"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert [path for path in root.rglob("*") if path.is_file()] == []


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

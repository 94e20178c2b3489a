"""Tokens from elsewhere: a pair that is registered stands in a blend where it lies; a wrong one nowhere."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path

from snaketron.data.text import blend
from snaketron.data.text.binidx import Writer
from snaketron.data.tokenizer import build, known_hashes, tokenizer_info
from snaketron.files import sha256
from snaketron.lineage.catalogue import scan
from snaketron.lineage.record import Record, read
from snaketron.log import UserError
from snaketron.settings.blends import PhaseSettings
from snaketron.settings.registering import RegisterSettings
from snaketron.settings.tokenizer import TokenizerSettings

import numpy as np
import pytest


def write_pair(prefix: Path, *documents: list[int], dtype: str = "uint16") -> Path:
    """A pair as Megatron's preprocess_data leaves it."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    paths = prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")
    writer = Writer(*paths, np.dtype(dtype), paths[0])
    for document in documents:
        writer.write(np.array(document), np.array([len(document)]))
    writer.close()
    return prefix


@pytest.fixture
def register(run_script, tmp_path: Path, tokenizer_dir: Path) -> Callable[..., tuple[int, str, Path]]:
    """Run register_tokens; returns exit status, standard error and the path of the record."""

    def run(prefix: Path, split: str = "train", sha256: str | None = None) -> tuple[int, str, Path]:
        record = tmp_path / "data/tokens/web" / f"{split}.{prefix.name}.json"
        settings = RegisterSettings.model_validate(
            {"source": "web", "split": split, "tokenizer_sha256": sha256}
        )
        status, stderr = run_script(
            "register_tokens",
            *("--pair", f"{prefix}.bin", f"{prefix}.idx", "--settings", settings.model_dump_json()),
            *("--tokenizer", tokenizer_dir, "--record", record),
        )
        return status, stderr, record

    return run


def made(register: Callable[..., tuple[int, str, Path]], *arguments: object) -> tuple[Path, Record]:
    status, stderr, record = register(*arguments)
    assert status == 0, stderr
    return record, read(record)


def refused(register: Callable[..., tuple[int, str, Path]], *arguments: object) -> str:
    status, stderr, record = register(*arguments)
    assert status == 1
    assert not record.exists() and not list(record.parent.glob("*"))
    return stderr


def test_a_pair_is_recorded_where_it_lies(register, tmp_path: Path, tokenizer_dir: Path):
    end = tokenizer_info(tokenizer_dir).eos_id
    prefix = write_pair(tmp_path / "store/web.v2_text_document", [5, 6, end], [7, 299], [8, end])
    path, record = made(register, prefix)
    assert (record.kind, record.name) == ("registered_tokens", "web/train.web.v2_text_document")
    files = {entry.name: entry for entry in record.inputs}
    assert (files["bin"].path, files["bin"].sha256, files["bin"].bytes) == (
        f"{prefix}.bin",
        sha256(Path(f"{prefix}.bin")),
        14,
    )
    assert files["idx"].sha256 == sha256(Path(f"{prefix}.idx"))
    assert files["bin"].modified == Path(f"{prefix}.bin").stat().st_mtime_ns
    assert record.outputs == ()
    assert {s: record.counts[s] for s in ("train", "valid", "test")} == {
        "train": {"documents": 3, "tokens": 7},
        "valid": {"documents": 0, "tokens": 0},
        "test": {"documents": 0, "tokens": 0},
    }
    assert (record.counts["largest_id"], record.counts["ended_documents"]) == (299, 2)
    assert not record.settings["tokenizer_known"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_blend_takes_registered_and_tokenized_shards_alike(
    register, tokenize, write_jsonl, tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
):
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": "12"}, {"text": "3"}])  # 3 + 2 tokens
    status, stderr, own = tokenize(text, valid=0.0, test=0.0)
    assert status == 0, stderr
    train = write_pair(tmp_path / "store/one", [5] * 15, [6] * 5)
    valid = write_pair(tmp_path / "store/two", [7] * 4)
    records = [own, made(register, train)[0], made(register, valid, "valid")[0]]
    with caplog.at_level(logging.WARNING):
        found = blend.build(
            PhaseSettings(phase="broad", weights={"docs": 1, "web": 3}, train_tokens=40),
            max_epochs=99,
            records=records,
            tokenizer=tokenizer_dir,
            output=tmp_path / "data/pretrain/broad/blend.json",
            record=tmp_path / "data/pretrain/broad/record.json",
        )
    assert found.train.prefixes == [str(own.parent / "train/a"), str(train)]
    assert (found.train.weights, found.train.tokens) == ([0.25, 0.75], 25)
    assert (found.valid.prefixes, found.valid.weights) == ([str(valid)], [1.0])
    assert found.test.prefixes == []
    assert (
        "test: corpus web is registered without and is left out: name pairs in its tokens.test" in caplog.text
    )
    blend.check_blend(tmp_path / "data/pretrain/broad/blend.json")
    catalogue = scan(tmp_path / "data")
    about = catalogue.about(tmp_path / "data/pretrain/broad/blend.json")
    behind = {one.record.name: one for one in catalogue.ancestors(about)}
    assert {"web/train.one", "web/valid.two"} < set(behind)
    used_by = catalogue.users(hashlib.sha256(np.array([7] * 4, np.uint16).tobytes()).hexdigest())
    assert [(made.record.name, entry.path) for made, entry in used_by] == [("web/valid.two", f"{valid}.bin")]
    Path(f"{train}.bin").write_bytes(b"\0" * 38)
    with pytest.raises(UserError, match=r"store/one.bin: 38 bytes, .*blend.json says 40"):
        blend.check_blend(tmp_path / "data/pretrain/broad/blend.json")


def test_ids_beyond_the_vocabulary_are_found_in_whatever_block(
    register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("snaketron.data.text.register._BLOCK", 4)  # two tokens
    prefix = write_pair(tmp_path / "store/web", [1, 2, 3], [4, 5, 300, 6], [7])
    assert (
        f"{prefix}.bin: token 5, in document 1, is 300, and the vocabulary has the ids 0 to 299"
        in refused(register, prefix)
    )


def test_a_documents_end_is_counted_in_whatever_block(
    register, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    end = tokenizer_info(tokenizer_dir).eos_id
    prefix = write_pair(tmp_path / "store/web", [1, 2, end], [end], [4, 5], [6, 7, 8, 9, end])
    for block in (2, 4, 6, 1000):
        monkeypatch.setattr("snaketron.data.text.register._BLOCK", block)
        assert made(register, prefix)[1].counts["ended_documents"] == 3


def test_documents_without_an_end_are_told(register, tmp_path: Path):
    status, stderr, _ = register(write_pair(tmp_path / "store/web", [1, 2], [3]))
    assert status == 0
    assert "none of its 2 documents ends with the token" in stderr


def test_another_tokenizer_is_refused_and_its_own_is_known(register, tmp_path: Path, tokenizer_dir: Path):
    prefix = write_pair(tmp_path / "store/web", [1, 2])
    said = refused(register, prefix, "train", "ab" * 32)
    here = sha256(tokenizer_dir / "tokenizer.json")
    assert f"made with a tokenizer.json of sha256 {'ab' * 32}, and {tokenizer_dir} has {here}" in said
    assert made(register, prefix, "train", here)[1].settings["tokenizer_known"]


def test_the_file_that_the_tokenizer_was_made_of_has_a_hash_of_its_own(tmp_path: Path, tokenizer_dir: Path):
    """A tokenizer written again in other bytes; whoever made the tokens knows the hash of the original."""
    original = tmp_path / "original"
    original.mkdir()
    compact = json.dumps(json.loads((tokenizer_dir / "tokenizer.json").read_text()))
    (original / "tokenizer.json").write_text(compact)
    (original / "tokenizer_config.json").write_bytes((tokenizer_dir / "tokenizer_config.json").read_bytes())
    made = tmp_path / "data/tokenizer"
    settings = TokenizerSettings(path=str(original))
    build([], settings=settings, output=made / "tokenizer.json", record=made / "record.json")
    known = known_hashes(made)
    assert known == [sha256(made / "tokenizer.json"), sha256(original / "tokenizer.json")]
    assert known[0] != known[1] and known_hashes(tokenizer_dir) == [sha256(tokenizer_dir / "tokenizer.json")]
    for given in (None, *known):
        settings = RegisterSettings(source="web", split="train", tokenizer_sha256=given)
        assert not list(settings.tokenizer_differences(made, known))


def test_everything_that_headers_show_is_said_at_once(register, tmp_path: Path):
    prefix = write_pair(tmp_path / "store/web", [1, 2], [3], dtype="int32")
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.truncate(8)
    said = refused(register, prefix, "train", "ab" * 32)
    assert f"{prefix}.idx: holds int32, where ids of this vocabulary are uint16" in said
    assert f"{prefix}.bin: 8 bytes, where web.idx promises 12" in said
    assert "ab" * 32 in said


def test_an_index_that_contradicts_itself_is_refused(register, tmp_path: Path):
    """The header and the last sequence are right, and a length in the middle is not."""
    prefix = write_pair(tmp_path / "store/web", [1, 2], [3, 4], [5])
    index = bytearray(Path(f"{prefix}.idx").read_bytes())
    struct.pack_into("<i", index, 34, 3)
    Path(f"{prefix}.idx").write_bytes(index)
    assert "promises 12; restore the file, or take it out of the configuration" in refused(register, prefix)


def test_the_program_wants_both_files_of_one_prefix(run_script, tmp_path: Path):
    status, stderr = run_script(
        "register_tokens",
        *("--pair", tmp_path / "a.bin", tmp_path / "b.idx", "--settings", json.dumps({})),
        *("--tokenizer", tmp_path, "--record", tmp_path / "r.json"),
    )
    assert status == 2 and "give PREFIX.bin and PREFIX.idx of one prefix" in stderr

"""What a dry-run says of tokens and packs from elsewhere, by their headers alone."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from snaketron.config import Config, ConfigError, load
from snaketron.graph.checks import check_files
from snaketron.graph.graph import Graph
from snaketron.lineage.record import FOOTER
from snaketron.sources import registered
from snaketron.sources.pairs import HEADER, MAGIC, differences

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lab/tiny").mkdir(parents=True)  # a tokenizer that nobody reads here


def write_pair(prefix: str, *lengths: int, code: int = 8, itemsize: int = 2, **changed: Any) -> None:
    """A pair of documents of these lengths; `changed` replaces parts of the header."""
    values = {"magic": MAGIC, "version": 1, "sequences": len(lengths), "bounds": len(lengths) + 1} | changed
    header = HEADER.pack(values["magic"], values["version"], code, values["sequences"], values["bounds"])
    offsets = [sum(lengths[:i]) * itemsize for i in range(len(lengths))]
    index = struct.pack(f"<{len(lengths)}i{len(lengths)}q", *lengths, *offsets)
    index += struct.pack(f"<{len(lengths) + 1}q", *range(len(lengths) + 1))
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.idx").write_bytes(header + index)
    Path(f"{prefix}.bin").write_bytes(bytes(itemsize * sum(lengths)))


def write_packs(path: str, **footer: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array([[1]], pa.list_(pa.int32())) for name in registered.COLUMNS}
    table = pa.table(columns).replace_schema_metadata({FOOTER: str(footer).replace("'", '"')})
    pq.write_table(table, path)


def config(**values: Any) -> Config:
    return load({"tokenizer": {"path": "lab/tiny", "chat_template": None}} | values, {})


def web(**tokens: Any) -> dict[str, Any]:
    """A configuration whose only corpus was tokenized elsewhere."""
    phase = {"name": "one", "tokens": 300_000, "blend": [{"corpus": "web", "weight": 1}]}
    return {"corpora": [{"name": "web", "tokens": tokens}], "pretrain": {"phases": [phase]}}


def said(checked: Config) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        registered.check(checked)
    return str(refused.value).splitlines()


def test_a_sound_pair_has_no_differences():
    for name, lengths in (("store/empty", ()), ("store/some", (3, 4))):
        write_pair(name, *lengths)
        assert list(differences(Path(name), "uint16")) == []
    write_pair("store/large", 3, code=4, itemsize=4)
    assert (
        list(differences(Path("store/large"), "int32")) == list(differences(Path("store/large"), None)) == []
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"magic": b"PAR1     "}, "web.idx: no index of Megatron (it does not begin with MMIDIDX)"),
        ({"version": 2}, "web.idx: version 2 of the format, where 1 is known"),
        ({"code": 5}, "web.idx: holds int64, where token ids are int32 or uint16"),
        ({"code": 99}, "web.idx: holds type code 99, where token ids are int32 or uint16"),
        ({"code": 4, "itemsize": 4}, "web.idx: holds int32, where ids of this vocabulary are uint16"),
        (
            {"bounds": 2},
            "web.idx: 1 documents of 2 sequences, where each document is one sequence (it was made with "
            "--split-sentences?)",
        ),
        ({"sequences": 3, "bounds": 4}, "web.idx: 98 bytes, where 3 sequences take 102"),
    ],
)
def test_what_a_header_shows(header: dict[str, Any], expected: str):
    write_pair("web", 3, 4, **header)
    if "sequences" in header:  # as long as the index of a file that was cut off
        expected = f"web.idx: {34 + 24 + 24} bytes, where 3 sequences take {34 + 36 + 32}"
    assert list(differences(Path("web"), "uint16")) == [expected]


def test_a_directory_of_pairs_is_named_as_one():
    write_pair("store/a", 3)
    said = "store is a directory; name the pairs in it, such as store/*"
    assert list(differences(Path("store"), "uint16")) == [said]


def test_all_differences_are_said_at_once_with_path_and_key():
    write_pair("store/a", 3, 4)
    Path("store/a.bin").write_bytes(bytes(13))
    write_pair("store/b", 5)
    Path("store/b.bin").unlink()
    write_pair("store/c", 5)
    Path("store/c.idx").write_bytes(b"MMIDIDX\0\0")
    write_packs("store/d.parquet", pack_size=9, split="train", tokenizer_sha256="x")
    Path("store/e.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"input_ids": [[1]]}), "store/f.parquet")
    packs = {"train": ["store/d.parquet", "store/g.parquet"], "valid": ["store/e.parquet"]}
    packs |= {"test": ["store/f.parquet"], "tokenizer_sha256": "ab" * 32}
    values = web(train=["store/a", "store/b"], valid=["store/c"], test=["store/no*"])
    values |= {"chats": [{"name": "help", "packs": packs}], "sft_data": {"pack_size": 8}}
    values |= {"sft": {"blend": [{"source": "help", "weight": 1}]}}
    lines = said(config(**values))
    assert [line.partition(" (")[0] for line in lines] == [
        "corpora[0].tokens.test[0]: no pair matches store/no*",
        "corpora[0].tokens.train[0]: store/a.bin: 13 bytes, where a.idx promises 14",
        "corpora[0].tokens.train[1]: store/b.bin: no such file",
        "corpora[0].tokens.valid[0]: store/c.idx: 9 bytes, shorter than the header of 34",
        "chats[0].packs.train[0]: store/d.parquet: was made with pack_size 9, where 8 is wanted; set "
        "sft_data.pack_size to it, or pack them again",
        f"chats[0].packs.train[0]: store/d.parquet: was made with tokenizer_sha256 x, where {'ab' * 32} is "
        "wanted; pack them again, or take the tokenizer that they were made with",
        "chats[0].packs.train[1]: store/g.parquet: no such file",
        "chats[0].packs.valid[0]: store/e.parquet: damaged or not Parquet",
        "chats[0].packs.test[0]: store/f.parquet: has no column loss_mask, seq_start_id; packs have "
        "input_ids, loss_mask, seq_start_id",
    ]


def test_a_tokenizer_that_is_trained_here_cannot_have_made_them_unless_its_hash_says_so():
    write_pair("store/a", 3)
    write_packs("store/a.parquet", pack_size=1024)
    own = {"path": None, "chat_template": "t.jinja"}
    values = web(train=["store/a"]) | {"tokenizer": own}
    values |= {"chats": [{"name": "help", "packs": {"train": ["store/a.parquet"]}}]}
    values |= {"sft": {"blend": [{"source": "help", "weight": 1}]}}
    lines = said(config(**values))
    assert len(lines) == 2 and all("trains its own (tokenizer.path: null)" in line for line in lines)
    for one in (values["corpora"][0]["tokens"], values["chats"][0]["packs"]):
        one["tokenizer_sha256"] = "ab" * 32
    registered.check(config(**values))


def test_each_pair_and_file_is_a_shard_of_its_split():
    for name in ("store/x/part_0", "store/y/part_0", "store/Web.1_document"):
        write_pair(name, 3)
    graph = Graph(
        config(**web(train=["store/?/part_0", "store/Web.1_document.bin"], valid=["store/x/part_0"]))
    )
    shards = graph.text["web"]
    named, hashed = "train.part_0", next(name for name in shards if name.startswith("train.part_0."))
    assert shards == {
        named: ["store/x/part_0.bin", "store/x/part_0.idx"],
        hashed: ["store/y/part_0.bin", "store/y/part_0.idx"],
        "train.web.1_document": ["store/Web.1_document.bin", "store/Web.1_document.idx"],
        "valid.part_0": ["store/x/part_0.bin", "store/x/part_0.idx"],
    }
    assert said(graph.config) == [
        "corpora[0].tokens.valid[0]: store/x/part_0 is named by corpora[0].tokens.train[0] too; name it once"
    ]
    both = web(train=["store/x/part_0"])
    both["corpora"].append({"name": "more", "tokens": {"train": ["store/y/../x/part_0"]}})
    both["pretrain"]["phases"][0]["blend"].append({"corpus": "more", "weight": 1})
    graph = Graph(config(**both))
    with pytest.raises(ConfigError, match=r"corpora\[1\] \(more\): reads .*, which corpora\[0\] reads too"):
        check_files(graph.config, graph.text, graph.conversations, graph.lock)


def test_a_directory_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch):
    """A glob would pass over it. (To root every place is open.)"""
    for name in ("mine/a", "hers/b"):
        write_pair(f"store/{name}", 3)
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != "store/hers")
    with pytest.raises(ConfigError, match=r"tokens.train\[0\]: store/hers cannot be read"):
        registered.check(config(**web(train=["store/*/?"])))


def test_keys_without_an_effect_on_them_are_refused():
    values = web(train=["store/a"])
    values["corpora"][0] |= {"paths": ["raw"], "curation": {"pii": True}}
    with pytest.raises(ConfigError, match=r"corpora\[0\] \(web\): give one of paths, hub and tokens"):
        config(**values)
    del values["corpora"][0]["paths"]
    values["corpora"][0] |= {"where": {"lang": ["en"]}, "text_field": "text"}
    with pytest.raises(ConfigError) as refused:
        config(**values)
    assert str(refused.value).splitlines() == [
        f"corpora[0].{name}: has no effect on tokens that were made elsewhere; leave it out"
        for name in ("where", "curation")
    ]
    with pytest.raises(ConfigError, match=r"corpora\[0\].tokens.train: list should have at least 1 item"):
        config(**web(train=[]))

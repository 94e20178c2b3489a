"""Raw files that a blend would train on twice, and tokenizers that are not there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from snaketron.config import ConfigError, load
from snaketron.graph.checks import (
    LONGEST_ARGUMENT,
    check_files,
    check_lengths,
    check_secrets,
    check_tokenizer,
)
from snaketron.graph.graph import Graph
from snaketron.lineage.record import making

import pytest

MADE = "data/tokenizer/record.json"


@pytest.fixture(autouse=True)
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "raw" / name).touch()
    (tmp_path / "link.jsonl").symlink_to("raw/a.jsonl")


def check(phases: dict[str, str], *corpora: dict[str, Any], **values: Any) -> str:
    """What is said of corpora in phases, each given as the names of its corpora."""
    blends = [
        {"name": name, "tokens": 300_000, "blend": [{"corpus": c, "weight": 1} for c in names.split()]}
        for name, names in phases.items()
    ]
    config = load({"corpora": list(corpora), "pretrain": {"phases": blends}} | values, {})
    graph = Graph(config)
    try:
        check_files(config, graph.text, graph.conversations, graph.lock)
    except ConfigError as error:
        return str(error)
    return ""


ONE = {"name": "one", "paths": ["raw/a.jsonl"]}
ADVICE = (
    "so a blend of both would train on it twice; take it out of one, or choose other rows of it with `where`"
)


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["raw/a.jsonl"], "reads raw/a.jsonl, which corpora[0] reads too, "),
        (["raw/*.jsonl"], "reads raw/a.jsonl, which corpora[0] reads too, "),
        (["link.jsonl"], "reads link.jsonl, which corpora[0] reads too as raw/a.jsonl, "),
        (["raw/b.jsonl"], None),
    ],
)
def test_a_file_in_two_corpora_of_a_blend_is_refused_whatever_it_is_called(
    paths: list[str], said: str | None
):
    found = check({"all": "one two"}, ONE, {"name": "two", "paths": paths})
    assert found.splitlines()[:1] == ([f"corpora[1] (two): {said}{ADVICE}"] if said else [])


def test_a_file_that_is_trained_on_may_not_be_held_out():
    found = check({"all": "one two"}, ONE, ONE | {"name": "two", "split": "valid"})
    assert found.startswith(
        "corpora[1] (two): reads raw/a.jsonl, which corpora[0] reads too, so a blend of both would have it "
        "in train and in valid; take it out of one"
    )


def test_a_corpus_may_not_read_a_file_twice():
    found = check({"all": "one"}, {"name": "one", "paths": ["raw/a.jsonl", "link.jsonl"]})
    assert found == "corpora[0] (one): link.jsonl and raw/a.jsonl are one file; name it once"


def test_other_rows_of_a_file_are_other_text():
    rows = [{**ONE, "where": {"lang": ["en"]}}, {**ONE, "name": "two", "where": {"lang": ["fr"]}}]
    assert check({"all": "one two"}, *rows) == ""


def test_what_two_phases_read_is_no_blend_of_both():
    assert check({"first": "one", "second": "two"}, ONE, {"name": "two", "paths": ["raw"]}) == ""


def test_a_file_of_conversations_may_be_rendered_in_two_ways():
    chats = [{"name": "one", "paths": ["raw/a.jsonl"]}, {"name": "two", "paths": ["raw/a.jsonl"]}]
    sft = {"blend": [{"source": name, "weight": 1} for name in ("one", "two")]}
    found = check({"all": "one"}, {"name": "one", "paths": ["raw/b.jsonl"]}, chats=chats, sft=sft)
    assert found == f"chats[1] (two): reads raw/a.jsonl, which chats[0] reads too, {ADVICE}"
    chats[1]["reasoning"] = {"stripped": 1}  # type: ignore[assignment]
    assert check({"all": "one"}, {"name": "one", "paths": ["raw/b.jsonl"]}, chats=chats, sft=sft) == ""


def test_a_file_that_lies_elsewhere_is_known_by_its_content(tmp_path: Path):
    addresses = {"one": "https://a.example/x.jsonl", "two": "https://b.example/y.jsonl"}
    listed = {
        name: {
            "request": {"paths": [address]},
            "revision": None,
            "files": [{"name": "x.jsonl", "address": address, "size": 9, "sha256": "ab"}],
        }
        for name, address in addresses.items()
    }
    Path("sources.lock.json").write_text(json.dumps({"version": 1, "sources": listed}), encoding="utf-8")
    found = check({"all": "one two"}, *({"name": name, "paths": [a]} for name, a in addresses.items()))
    assert found.startswith("corpora[1] (two): reads <data>/raw/two/x.jsonl, which corpora[0] reads too as ")


def test_a_tokenizer_that_is_not_there_is_refused_before_the_first_job(tmp_path: Path):
    def refused(**tokenizer: str) -> str:
        with pytest.raises(ConfigError) as error:
            check_tokenizer(load({"tokenizer": tokenizer}, {}))
        return str(error.value)

    assert refused(path="mine") == (
        "tokenizer.path: 'mine' is no directory, and no OWNER/NAME of the Hugging Face hub"
    )
    assert refused(path="raw") == "tokenizer.path: raw holds no tokenizer, such as a tokenizer.json"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokenizer.json").touch()
    for path in ("mine", "lab/tiny", None):  # there, of the hub, trained
        check_tokenizer(load({"tokenizer": {"path": path}}, {}))
    outputs = {"tokenizer.json": tmp_path / "data/tokenizer/tokenizer.json"}
    with making("tokenizer", "tokenizer", outputs=outputs, record=tmp_path / MADE) as job:
        job.settings = {"path": "gone"}
        job.aside["tokenizer.json"].touch()
    check_tokenizer(load({"tokenizer": {"path": "gone"}}, {}))  # taken before
    assert refused(path="other").startswith("tokenizer.path: 'other' is no directory")


def test_secrets_that_no_training_could_read_are_refused_before_the_first_job(tmp_path: Path):
    secrets = tmp_path / "secrets"
    config = load({"cluster": {"secrets_file": str(secrets)}}, {})
    with pytest.raises(ConfigError, match=rf"cluster.secrets_file {secrets}: no such file or directory"):
        check_secrets(config)
    secrets.touch(0o644)
    with pytest.raises(ConfigError, match="its mode is 644, so others can read it; run chmod 600"):
        check_secrets(config)
    secrets.chmod(0o600)
    check_secrets(config)
    check_secrets(load({}, {}))


def test_more_shards_than_megatron_core_numbers_are_refused_before_the_first_is_made(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("snaketron.graph.checks.MAX_SHARDS", 1)
    two = {"name": "one", "paths": ["raw"]}
    assert check({"all": "one"}, ONE) == ""
    assert check({"all": "one"}, two).startswith("pretrain.phases[0].blend: 2 shards, where megatron-core")
    assert check({"all": "one"}, two, pretrain_data={"shard_size": 1000}) == ""
    assert check({"all": "one"}, two | {"where": {"lang": ["en"]}}) == ""  # one may be left empty


def test_settings_that_no_command_can_take_are_refused_before_the_first_job():
    """A blend of 3,000 sources, say: thousands of jobs were done before one could not begin."""
    most, longer = "x" * LONGEST_ARGUMENT, "x" * (LONGEST_ARGUMENT + 1)
    assert subprocess.run(["true", most]).returncode == 0
    with pytest.raises(OSError, match="Argument list too long"):
        subprocess.run(["true", longer])

    def said(entries: int, chosen: int) -> str:
        names = [f"corpus_{i:05d}" for i in range(entries)]
        corpora = [{"name": name, "paths": ["raw/a.jsonl"]} for name in names]
        corpora[0]["where"] = {"id": [f"{i:08d}" for i in range(chosen)]}
        blend = [{"corpus": name, "weight": 1} for name in names]
        phases = [{"name": "all", "tokens": 300_000, "blend": blend}]
        try:
            check_lengths(load({"corpora": corpora, "pretrain": {"phases": phases}}, {}))
        except ConfigError as error:
            return str(error)
        return ""

    # An entry such as "corpus_00007":0.0002777777777777778 and its comma are 37 bytes, a value 11.
    assert said(3_000, 10_000) == ""
    assert said(3_600, 1) == (
        "pretrain.phases[0].blend: 133,249 bytes of settings for one command, where Linux takes 131,071; "
        "make one source of several: its `paths` may be many"
    )
    assert said(1, 12_000).startswith("corpora[0]: 132,")

"""What the lock file lists, for whom, and what it refuses."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import ChatSource, ConfigError, Corpus
from snaketron.sources.lockfile import check_addresses, read_lock, remote
from snaketron.sources.models import TOKENIZER, HubRepository
from snaketron.sources.shards import shards, to_download
from tests.unit.sources.locked import HUB, WEB, config, entry, listed, write_lock

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_not_listed_names_the_command_that_lists_it(here: Path):
    lock = read_lock("sources.lock.json", [here / "mine.yaml", Path("/site/my roots.yaml")])
    with pytest.raises(ConfigError) as error:
        shards(HUB, "corpora[1]", lock)
    assert str(error.value) == (
        "corpora[1] (math): its files are not listed in sources.lock.json yet. List them, and commit it:\n"
        "  python scripts/lock_sources.py --configfile mine.yaml '/site/my roots.yaml'"
    )


def test_a_dry_run_assumes_one_file_of_what_is_not_listed_and_says_so():
    lock = read_lock("sources.lock.json", assuming=True)
    for _ in range(2):
        assert shards(HUB, "corpora[1]", lock) == {"unlisted": ["<data>/raw/math/unlisted.jsonl"]}
        assert HubRepository("lab/tiny", "tokenizer.path", TOKENIZER).files(lock) == [
            f"<data>/hub/lab/tiny/{name}.json" for name in ("config", "tokenizer", "tokenizer_config")
        ]
    of_source, of_model = lock.unlisted.values()  # each once
    assert of_source.startswith("corpora[1] (math): its files are not listed in sources.lock.json yet. ")
    assert of_model.startswith("tokenizer.path: lab/tiny is no directory here, ")
    assert lock.assumed() == (
        "the files of math and 1 other source of the configuration are not listed in sources.lock.json yet. "
        "List them, and commit it:\n  python scripts/lock_sources.py"
    )
    assert (lock.sources, lock.models) == ({}, {})  # nothing of it would be written
    assert to_download(config(corpora=[Corpus(name="docs", paths=["raw"]), HUB]), lock) is None


@pytest.mark.parametrize(
    "change", [{"configuration": "4plus_MIND"}, {"split": "test"}, {"revision": "v2"}, {"repository": "a/b"}]
)
def test_what_was_listed_for_another_request_is_not_used(change: dict[str, str]):
    assert HUB.hub
    lock = write_lock(math=entry({"hub": HUB.hub.model_dump()}, ("a.parquet", 1)))
    assert list(shards(HUB, "corpora[1]", lock)) == ["a"]
    changed = HUB.model_copy(update={"hub": HUB.hub.model_copy(update=change)})
    with pytest.raises(ConfigError, match=r"lists what .*4plus.* asked for, and now it is .*\n  python"):
        shards(changed, "corpora[1]", lock)


def test_other_settings_of_a_source_do_not_ask_for_another_listing():
    lock = listed(("a.parquet", 1))
    assert shards(WEB.model_copy(update={"text_field": "body", "where": {"a": ["b"]}}), "corpora[0]", lock)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 2, "sources": {}}',
        '{"version": 1, "sources": {"web": {"files": []}}}',
        '{"version": 1, "sources": {"web": {"request": {}, "files": []}}}',
        '{"version": 1, "sources": {"web": {"request": {}, "revision": null, "files": [{"name": "a"}]}}}',
        '<<<<<<< HEAD\n{"version": 1}',
    ],
)
def test_a_damaged_lock_file_is_named(text: str):
    Path("lock.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^sources_lock: lock.json is not a lock file \(.*\n  python"):
        read_lock("lock.json")


@pytest.mark.parametrize(
    ("path", "secret"),
    [
        ("https://me:hunter2@host/a.jsonl", "hunter2"),
        ("s3://KEY:hunter2@bucket/a.jsonl", "hunter2"),
        ("https://host/a.jsonl?X-Amz-Signature=hunter2&X-Amz-Date=1", "hunter2"),
        ("https://host/a.jsonl?sv=1&sig=hunter2", "hunter2"),
        ("https://host/a.jsonl?access_token=hunter2", "hunter2"),
        ("https://host/a.jsonl?AWSAccessKeyId=hunter2", "hunter2"),
    ],
)
def test_an_address_with_a_secret_is_refused_and_the_secret_not_repeated(path: str, secret: str):
    with pytest.raises(ConfigError, match="put credentials into the environment") as error:
        shards(Corpus(name="web", paths=[path]), "corpora[0]", read_lock("none"))
    assert (secret not in str(error.value) and "/a.jsonl" in str(error.value)) or "bucket" in str(error.value)


@pytest.mark.parametrize(
    "path",
    [
        "https://host/a.jsonl?download=true",
        "hf://datasets/lab/math@main/data/*.parquet",
        "s3://bucket/tokens/a?.jsonl",
    ],
)
def test_other_addresses_are_not_taken_for_secrets(path: str):
    check_addresses(Corpus(name="web", paths=[path]), "corpora[0]")


def test_files_and_addresses_are_not_mixed_in_a_source():
    with pytest.raises(ConfigError, match=r"corpora\[0\].paths\[1\]: raw is of this machine .* two sources"):
        shards(Corpus(name="web", paths=["s3://bucket/a.jsonl", "raw"]), "corpora[0]", read_lock("none"))


def test_two_sources_of_one_name_may_not_both_be_downloaded():
    chats = [ChatSource(name="web", paths=["s3://bucket/chats.jsonl"])]
    sft = {"blend": [{"source": "web", "weight": 1}]}
    with pytest.raises(ConfigError, match=r"chats\[0\]: corpora\[1\] is called 'web' too, .* rename one"):
        remote(config(chats=chats, sft=sft))
    assert list(remote(config())) == ["web", "math"]

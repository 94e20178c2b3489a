"""What is read to list a source: only files that are used, many at a time, and none twice."""

from __future__ import annotations

import gzip
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from snaketron.config import Config, ConfigError, Corpus
from snaketron.data.rows import read_texts
from snaketron.log import UserError
from snaketron.sources.listing import lock_sources
from snaketron.sources.lockfile import read_lock
from snaketron.sources.patience import Patience, ask
from tests.faulty_server import FaultyServer
from tests.unit.sources.locked import config as configured

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

PATIENCE = Patience(retries=1, stall_timeout=60, first_pause=0.01)
LINES = b'{"text": "a"}\n'
KEPT = Path(".sources.lock.json.hashes")


class Store(MemoryFileSystem):
    """Files with entity tags, as object stores have them; remembers which ones were read."""

    protocol = ("store",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    opened: ClassVar[list[str]] = []
    before: ClassVar[Callable[[str], object]] = lambda path: None  # is called before a file is opened

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("store://", "memory://")))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        info = super().info(path, **kwargs)
        if info["type"] == "directory":
            return info
        return info | {"ETag": f'"{hashlib.md5(self.store[info["name"]].getvalue()).hexdigest()}"'}

    def find(self, path: str, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: self.info(name) for name in super().find(path)}

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        Store.before(path)
        if mode == "rb":
            Store.opened.append(path.rpartition("/")[2])
        return super().open(path, mode, **kwargs)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.chdir(tmp_path)
    fsspec.register_implementation("store", Store, clobber=True)
    system = fsspec.filesystem("store")
    Store.store.clear()
    monkeypatch.setattr(Store, "before", lambda path: None)
    for i in range(4):
        system.pipe(f"/raw/{i}.jsonl", LINES * (i + 1))
    Store.opened.clear()
    yield system


def config(*paths: str, **changes: Any) -> Config:
    docs, _, math = configured().corpora
    web = Corpus(name="web", paths=list(paths or ("store://raw",)), **changes)
    return configured(corpora=[docs, web, math])


def lock(config: Config, **options: Any) -> None:
    lock_sources(config, names=["web"], patience=PATIENCE, **options)


def listed() -> list[str]:
    return list(read_lock("sources.lock.json").files("web"))


def test_only_files_that_are_used_are_read(store: Store):
    lock(config(max_files=2))
    assert listed() == ["0.jsonl", "1.jsonl"] and sorted(Store.opened) == listed()

    locked = read_lock("sources.lock.json")
    locked.check(config(max_files=1).corpora[1], "corpora[1]")
    for more, asked in ((3, "max_files is 3"), (None, r"all are asked for \(max_files\)")):
        with pytest.raises(ConfigError, match=f"lists the first 2 files, and now {asked}. List them"):
            locked.check(config(max_files=more).corpora[1], "corpora[1]")

    Store.opened.clear()
    lock(config(max_files=3))
    assert (listed(), Store.opened) == (["0.jsonl", "1.jsonl", "2.jsonl"], ["2.jsonl"])
    Store.opened.clear()
    lock(config(max_files=1))  # more are listed, which does no harm
    assert len(listed()) == 3 and not Store.opened
    lock(config())
    assert len(listed()) == 4
    read_lock("sources.lock.json").check(config().corpora[1], "corpora[1]")


def test_of_several_addresses_only_the_first_are_listed_when_they_have_enough(store: Store):
    lock(config("store://raw/3.jsonl", "store://raw", "nowhere://raw", max_files=3))
    assert listed() == ["3.jsonl", "0.jsonl", "1.jsonl"]


def test_what_has_not_changed_is_not_read_again(store: Store):
    lock(config())
    before = read_lock("sources.lock.json").files("web")
    Store.opened.clear()
    lock(config(), update=True)
    assert (read_lock("sources.lock.json").files("web"), Store.opened) == (before, [])

    store.pipe("/raw/1.jsonl", LINES.replace(b"a", b"b") * 2)  # of the same size
    Store.opened.clear()
    lock(config(), update=True)
    after = read_lock("sources.lock.json").files("web")
    assert Store.opened == ["1.jsonl"]
    assert [name for name in before if before[name] != after[name]] == ["1.jsonl"]
    assert after["1.jsonl"].sha256 == hashlib.sha256(LINES.replace(b"a", b"b") * 2).hexdigest()


def test_a_key_with_a_question_mark_keeps_its_name(store: Store):
    """Only in an address of HTTP is what follows it no part of the name."""
    store.pipe("/raw/why?.jsonl", LINES)
    lock(config())
    before = read_lock("sources.lock.json").files("web")
    assert "why_.jsonl" in before
    KEPT.unlink()  # as when all sources are listed
    lock(config(), update=True)
    assert read_lock("sources.lock.json").files("web") == before


def test_an_interrupted_listing_goes_on_where_it_ended(store: Store, monkeypatch: pytest.MonkeyPatch):
    def fail_at_last(path: str) -> None:
        if path.endswith("2.jsonl"):
            while not (KEPT.exists() and KEPT.read_bytes().count(b"\n") == 3):
                time.sleep(0.01)
            raise PermissionError("not yours")

    monkeypatch.setattr(Store, "before", fail_at_last)
    with pytest.raises(UserError, match=r"store:///?raw/2.jsonl: no access \(not yours\)"):
        lock(config())
    assert not Path("sources.lock.json").exists()

    KEPT.write_bytes(KEPT.read_bytes() + b'["store://raw/2.jso')  # killed while it was written
    monkeypatch.setattr(Store, "before", lambda path: None)
    Store.opened.clear()
    lock_sources(config(), patience=PATIENCE, names=["web"])
    assert (Store.opened, len(listed())) == (["2.jsonl"], 4)
    for name, file in read_lock("sources.lock.json").files("web").items():
        assert file.sha256 == hashlib.sha256(LINES * (int(name[0]) + 1)).hexdigest()


def test_what_is_kept_of_an_interrupted_listing_goes_when_all_is_listed(store: Store):
    KEPT.write_bytes(b"")
    alone = config().model_copy(update={"corpora": [c for c in config().corpora if c.name != "math"]})
    lock_sources(alone, patience=PATIENCE)
    assert not KEPT.exists()


def test_files_are_read_at_the_same_time(store: Store, monkeypatch: pytest.MonkeyPatch):
    all_four = threading.Barrier(4)
    monkeypatch.setattr(Store, "before", lambda path: all_four.wait(timeout=600))
    lock(config())
    assert len(listed()) == 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_page_in_the_place_of_the_data_is_not_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """A server that wants a login answers with a page of its own, and with status 200."""
    monkeypatch.chdir(tmp_path)
    with FaultyServer() as server:
        source = config(server.put(f"/{name}", b"\n<!DOCTYPE html><title>Log in</title>"))
        with pytest.raises(
            UserError, match=rf"/{name}: is a web page and not the data; it may ask for a login"
        ):
            lock(source)
    assert not Path("sources.lock.json").exists()


# Content-Encoding: gzip


def test_what_is_stored_compressed_under_another_name_is_decompressed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    stored = gzip.compress(LINES * 3, mtime=0)
    with FaultyServer() as server:
        source = config(server.put("/a.jsonl", stored), server.put("/b.jsonl.gz", stored))
        lock(source)
        for name in ("a.jsonl.gz", "b.jsonl.gz"):
            file = read_lock("sources.lock.json").file("web", name)
            assert (file.size, file.sha256) == (len(stored), hashlib.sha256(stored).hexdigest())
        Path("a.jsonl.gz").write_bytes(stored)  # as it is downloaded
        assert [text for _, text in read_texts(Path("a.jsonl.gz"), "text")] == ["a"] * 3

        before = Path("sources.lock.json").read_bytes()
        lock(source, update=True)
        assert Path("sources.lock.json").read_bytes() == before
        server.put("/a.jsonl", LINES)
        lock(source, update=True)
        assert listed() == ["a.jsonl", "b.jsonl.gz"]

        with pytest.raises(UserError, match=r"c.parquet: it is stored compressed .* store it without"):
            lock(config(server.put("/c.parquet", stored)))


def test_an_encoding_that_the_client_decodes_on_the_way_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Store, "info", lambda self, path: {"type": "file", "contentEncoding": "gzip"})
    with pytest.raises(UserError, match=r"store:///raw/0.jsonl is stored with Content-Encoding: gzip"):
        lock(config("store://raw/0.jsonl"))


# Questions without an answer


def test_a_question_that_is_not_answered_is_asked_again_and_then_given_up(caplog: pytest.LogCaptureFixture):
    never = threading.Event()
    with pytest.raises(UserError) as error:
        ask(never.wait, at="corpora[0].paths[0]", what="s3://bucket", patience=Patience(2, 0.05, 0.01))
    never.set()
    assert str(error.value) == (
        "corpora[0].paths[0]: s3://bucket: nothing came for 0.05 s; asked 3 times. Check the endpoint and "
        "the network, and run again"
    )
    assert caplog.text.count("corpora[0].paths[0]: s3://bucket: nothing came for 0.05 s; trying again") == 2


def test_a_listing_that_hangs_ends(store: Store, monkeypatch: pytest.MonkeyPatch):
    never = threading.Event()
    monkeypatch.setattr(Store, "isfile", lambda self, path: never.wait())
    with pytest.raises(UserError, match=r"^corpora\[1\].paths\[0\]: store://raw: nothing came for 0.05 s"):
        lock_sources(config(), names=["web"], patience=Patience(1, 0.05, 0.01))
    never.set()
    assert not Path("sources.lock.json").exists()


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (ConnectionResetError("gone"), 2),
        (TimeoutError("late"), 2),
        (OSError(5, "internal error"), 2),
        (PermissionError("not yours"), 1),
        (FileNotFoundError("nothing"), 1),
        (ValueError("mistake"), 1),
    ],
)
def test_only_a_question_that_another_answer_may_follow_is_asked_again(error: Exception, asked: int):
    times = []

    def answer() -> None:
        times.append(error)
        raise error

    with pytest.raises(UserError, match=type(error).__name__):
        ask(answer, at="corpora[0]", what="s3://bucket", patience=PATIENCE)
    assert len(times) == asked

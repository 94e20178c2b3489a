"""Downloads from a server that breaks connections in every way that we could think of."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from snaketron.files import partial
from snaketron.log import UserError
from snaketron.sources.download import download, fetch
from snaketron.sources.patience import Patience
from tests.faulty_server import Fault, FaultyServer

import fsspec
import pytest

CONTENT = b"".join(b"%07d\n" % i for i in range(12_500))  # 100 kB, every 8 bytes of it different
SHORT_PATIENCE = Patience(retries=3, stall_timeout=20, first_pause=0.01)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "snaketron")


def get(address: str, tmp_path: Path, content: bytes = CONTENT, **changes: Any) -> bytes:
    """Download a file that the lock lists with `content`."""
    output = tmp_path / "raw/docs/a.jsonl"
    options = {
        "output": output,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "record": tmp_path / "raw/docs/a.jsonl.json",
        "name": "docs/a.jsonl",
        "patience": SHORT_PATIENCE,
    }
    download(address, **options | changes)
    return output.read_bytes()


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "raw/docs").iterdir())


def test_a_file_comes_with_a_record_of_where_it_was(server: FaultyServer, tmp_path: Path):
    address = server.put("/a.jsonl", CONTENT)
    assert get(address, tmp_path) == CONTENT
    assert left(tmp_path) == ["a.jsonl", "a.jsonl.json"]
    record = json.loads((tmp_path / "raw/docs/a.jsonl.json").read_text())
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert record["inputs"] == [{"name": "address", "path": address, "sha256": digest}]
    assert record["outputs"][0]["sha256"] == digest and record["counts"]["bytes"] == 100_000


def test_an_address_may_hold_what_a_url_must_quote(server: FaultyServer, tmp_path: Path):
    address = server.put("/a b/ü [1].jsonl", CONTENT)
    assert get(address, tmp_path) == CONTENT
    with pytest.raises(UserError, match=r"a\.jsonl: Invalid port: .http"):
        get("http://127.0.0.1:http/a.jsonl", tmp_path / "other")


def test_an_empty_file_is_asked_for_nothing(server: FaultyServer, tmp_path: Path):
    assert get(server.put("/a.jsonl", b""), tmp_path, b"") == b""
    assert server.requests == []


def test_a_broken_connection_is_opened_again_where_it_ended(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    address = server.put("/a.jsonl", CONTENT, Fault("drop", after=30_000), Fault("drop", after=50_001))
    assert get(address, tmp_path) == CONTENT
    assert server.starts("/a.jsonl") == [0, 30_000, 80_001]
    assert "the connection ended after 30000 of 100000 bytes; trying again in 0.0 s (1 of 3)" in caplog.text


def test_a_connection_on_which_nothing_comes_is_given_up_and_opened_again(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    address = server.put("/a.jsonl", CONTENT, Fault("stall", after=30_000), Fault("stall", after=0))
    assert get(address, tmp_path, patience=Patience(8, 0.5, 0.01)) == CONTENT
    # On a busy machine nothing may come for so long from a healthy server, too.
    assert list(dict.fromkeys(server.starts("/a.jsonl")))[-2:] == [0, 30_000]
    assert "nothing came for 0.5 s; trying again" in caplog.text


@pytest.mark.parametrize("kind", ["ignore_range", "early_range"])
def test_a_server_that_begins_elsewhere_than_asked_is_read_up_to_there(
    kind: str, server: FaultyServer, tmp_path: Path
):
    address = server.put("/a.jsonl", CONTENT, Fault("drop", after=30_000), Fault(kind))
    assert get(address, tmp_path) == CONTENT
    assert server.starts("/a.jsonl") == [0, 30_000]


def test_a_server_that_skips_bytes_is_asked_again(server: FaultyServer, tmp_path: Path):
    address = server.put("/a.jsonl", CONTENT, Fault("drop", after=30_000), Fault("strange_range"))
    assert get(address, tmp_path) == CONTENT
    assert server.starts("/a.jsonl") == [0, 30_000, 30_000]


def test_an_answer_that_pretends_to_be_complete_is_fetched_again(server: FaultyServer, tmp_path: Path):
    address = server.put("/a.jsonl", CONTENT, Fault("short", after=30_000))
    assert get(address, tmp_path) == CONTENT
    assert server.starts("/a.jsonl") == [0, 0]


def test_an_answer_of_another_size_does_not_cost_what_was_fetched_before(
    server: FaultyServer, tmp_path: Path
):
    address = server.put(
        "/a.jsonl", CONTENT, Fault("drop", after=90_000), Fault("content", content=b"<html>")
    )
    assert get(address, tmp_path) == CONTENT
    assert server.starts("/a.jsonl") == [0, 90_000, 90_000]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_that_is_busy_is_asked_again(status: int, server: FaultyServer, tmp_path: Path):
    busy = Fault("status", status=status, retry_after="0.02")
    assert get(server.put("/a.jsonl", CONTENT, busy, busy), tmp_path) == CONTENT


def test_attempts_are_counted_from_the_last_byte_that_came(server: FaultyServer, tmp_path: Path):
    busy = Fault("status", status=503)
    faults = [busy, busy, busy, Fault("drop", after=10_000), busy, busy, Fault("drop", after=10_000)]
    assert get(server.put("/a.jsonl", CONTENT, *faults), tmp_path) == CONTENT


def test_patience_ends_and_what_came_stays_for_the_next_run(server: FaultyServer, tmp_path: Path):
    busy = Fault("status", status=503)
    address = server.put("/a.jsonl", CONTENT, Fault("drop", after=30_000), *[busy] * 4)
    with pytest.raises(UserError) as error:
        get(address, tmp_path)
    assert str(error.value) == (
        f"{address}: the server answered 503 Service Unavailable; 4 attempts brought nothing after "
        "byte 30000. Run again to go on from there"
    )
    assert left(tmp_path) == [".a.jsonl.partial"]
    assert get(address, tmp_path) == CONTENT
    assert server.starts("/a.jsonl")[-1] == 30_000
    assert left(tmp_path) == ["a.jsonl", "a.jsonl.json"]


def test_a_server_that_is_not_there_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with FaultyServer() as gone:
        address = gone.put("/a.jsonl", CONTENT)
    with pytest.raises(UserError, match="Connection refused; 4 attempts brought nothing after byte 0"):
        get(address, tmp_path)
    assert caplog.text.count("trying again") == 3


@pytest.mark.parametrize(
    ("status", "advice"), [(404, "check the address"), (410, "check"), (401, "ask for"), (403, "ask for")]
)
def test_what_is_not_there_or_forbidden_is_not_asked_for_again(
    status: int, advice: str, server: FaultyServer, tmp_path: Path
):
    address = server.put("/a.jsonl", CONTENT, Fault("status", status=status))
    with pytest.raises(UserError, match=f"{address}: the server answered {status} .*; {advice}"):
        get(address, tmp_path)
    assert len(server.requests) == 1 and left(tmp_path) == []


def test_a_partial_file_that_is_wrong_is_fetched_once_more_from_its_beginning(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    output = tmp_path / "raw/docs/a.jsonl"
    output.parent.mkdir(parents=True)
    partial(output).write_bytes(b"x" * 30_000)
    assert get(server.put("/a.jsonl", CONTENT), tmp_path) == CONTENT
    assert server.starts("/a.jsonl") == [30_000, 0]
    assert "fetching it once more from its beginning" in caplog.text


def test_a_partial_file_that_is_too_long_is_fetched_from_its_beginning(server: FaultyServer, tmp_path: Path):
    output = tmp_path / "raw/docs/a.jsonl"
    output.parent.mkdir(parents=True)
    partial(output).write_bytes(CONTENT + b"x")
    assert get(server.put("/a.jsonl", CONTENT), tmp_path) == CONTENT
    assert server.starts("/a.jsonl") == [0]


def test_a_complete_partial_file_needs_no_server(tmp_path: Path):
    output = tmp_path / "raw/docs/a.jsonl"
    output.parent.mkdir(parents=True)
    partial(output).write_bytes(CONTENT)
    assert get("http://127.0.0.1:1/a.jsonl", tmp_path) == CONTENT


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (CONTENT.replace(b"0000001", b"0000002"), "its SHA-256 is "),
        (CONTENT[:-1], "it is 99999 bytes long and the lock file says 100000"),
        (CONTENT + b"x", "it is 100001 bytes long and the lock file says 100000"),
    ],
)
def test_a_file_that_has_changed_is_refused_and_nothing_is_left(
    there: bytes, why: str, server: FaultyServer, tmp_path: Path
):
    address = server.put("/a.jsonl", there)
    with pytest.raises(
        UserError, match=r"the file has changed since it was locked .*lock_sources.py --update"
    ) as e:
        get(address, tmp_path)
    assert why in str(e.value)
    assert server.starts("/a.jsonl") == [0, 0] and left(tmp_path) == []


def test_a_file_that_changes_while_it_is_fetched_is_not_mixed(server: FaultyServer, tmp_path: Path):
    old = b"old " * 25_000
    first = Fault("drop", after=30_000)
    address = server.put("/a.jsonl", CONTENT, first, Fault("content", content=old))
    assert get(address, tmp_path) == CONTENT  # the first of one, the rest of the other; then all of one
    assert server.starts("/a.jsonl") == [0, 30_000, 0]


def test_a_file_that_became_shorter_than_what_is_here_has_changed(server: FaultyServer, tmp_path: Path):
    output = tmp_path / "raw/docs/a.jsonl"
    output.parent.mkdir(parents=True)
    partial(output).write_bytes(CONTENT[:30_000])
    with pytest.raises(UserError, match=r"has changed since it was locked \(the file is shorter"):
        get(server.put("/a.jsonl", CONTENT[:20_000]), tmp_path)
    assert server.starts("/a.jsonl") == [30_000, 30_000] and left(tmp_path) == []


def test_a_token_is_told_to_the_hub_and_not_to_where_it_sends_us(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    resolved = "/datasets/lab/math/resolve/0123abc/data/a b.jsonl"
    server.put("/store/xyz", CONTENT, Fault("drop", after=10))
    server.redirects[resolved] = f"http://localhost:{server.port}/store/xyz?X-Amz-Signature=1"
    assert get("hf://datasets/lab/math@0123abc/data/a b.jsonl", tmp_path) == CONTENT
    assert [(r.path, r.start, r.authorization) for r in server.requests] == [
        (resolved, 0, "Bearer hf_secret"),
        ("/store/xyz", 0, None),
        (resolved, 10, "Bearer hf_secret"),
        ("/store/xyz", 10, None),
    ]


def test_two_processes_do_not_write_one_file(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    address = server.put("/a.jsonl", CONTENT, Fault("wait", after=30_000))
    first, second = (threading.Thread(target=get, args=(address, tmp_path)) for _ in range(2))
    first.start()
    until(lambda: server.requests)
    second.start()
    until(lambda: "waiting for another process" in caplog.text)
    server.go_on.set()
    first.join()
    second.join()
    assert server.starts("/a.jsonl") == [0]  # the second took what the first had made
    assert (tmp_path / "raw/docs/a.jsonl").read_bytes() == CONTENT
    assert left(tmp_path) == ["a.jsonl", "a.jsonl.json"]


def until(reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_disk_is_not_taken_for_a_broken_connection(server: FaultyServer):
    def full(_block: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fetch(server.put("/a.jsonl", CONTENT), full, patience=SHORT_PATIENCE)
    assert len(server.requests) == 1


def test_progress_is_said_from_time_to_time(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("snaketron.sources.download._REPORT", 0.0)
    address = server.put("/a.jsonl", CONTENT)
    get(address, tmp_path)
    assert f"{address}: 100 kB of 100 kB, " in caplog.text
    assert f"{address}: fetched 100 kB in " in caplog.text


# Everything that is not HTTP is read through fsspec.


def test_another_file_system_is_read_from_where_an_attempt_ended(tmp_path: Path):
    fsspec.filesystem("memory").pipe("/store/a.jsonl", CONTENT)
    (tmp_path / "b.jsonl").write_bytes(CONTENT)
    output = tmp_path / "raw/docs/a.jsonl"
    output.parent.mkdir(parents=True)
    for address in ("memory://store/a.jsonl", f"file://{tmp_path}/b.jsonl"):
        partial(output).write_bytes(CONTENT[:30_000])
        assert get(address, tmp_path) == CONTENT
        with pytest.raises(UserError, match="has changed since it was locked"):
            get(address, tmp_path, CONTENT[:-8] + b"another\n")


def test_a_missing_object_is_not_asked_for_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(UserError, match=r"memory://store/none.jsonl: no such file"):
        get("memory://store/none.jsonl", tmp_path)
    assert "trying again" not in caplog.text

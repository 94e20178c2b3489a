"""What comes of opening a file that lies elsewhere, from servers and drivers that behave badly."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

from snaketron.log import UserError
from snaketron.sources.streams import Broken, Changed, filesystem, open_stream, watched

import pytest


def answering(answer: bytes) -> str:
    """The address of a server that sends these bytes to the first who asks, and goes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server, server.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/a.jsonl"


def test_what_a_server_compressed_although_it_was_asked_not_to_stays_compressed():
    header = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n"
    stream = open_stream(answering(header + b"\x1f\x8b\x08\x00"), 0, 20)
    assert stream.size == 4 and b"".join(stream.blocks) == b"\x1f\x8b\x08\x00"


def test_an_answer_of_unknown_length_that_ends_in_the_middle_is_not_taken_for_complete():
    header = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    stream = open_stream(answering(header + b"5\r\nfirst\r\n"), 0, 20)
    assert stream.size is None and next(stream.blocks) == b"first"
    with pytest.raises(Broken, match="RemoteProtocolError"):
        next(stream.blocks)


def test_a_redirect_that_no_client_may_follow_is_refused():
    header = b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1/a.jsonl\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(UserError, match=r"a.jsonl: .*ftp://"):
        open_stream(answering(header), 0, 20)


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("s3://bucket/a.jsonl", "`uv sync --extra s3`"),
        ("gs://bucket/a.jsonl", "`uv sync --extra gcs`"),
        ("nowhere://bucket/a.jsonl", "nowhere:// is unknown"),
    ],
)
def test_a_missing_driver_names_the_extra_to_install(address: str, advice: str):
    try:
        filesystem(address)
    except UserError as error:
        assert advice in str(error)
    else:
        pytest.skip("the extra is installed")


def test_a_read_that_hangs_is_given_up():
    hang = threading.Event()

    def read() -> Iterator[bytes]:
        yield b"first"
        hang.wait(20)
        yield b"never"

    blocks = watched(read, 0.2)
    assert next(blocks) == b"first"
    with pytest.raises(Broken, match=r"nothing came for 0.2 s"):
        next(blocks)
    hang.set()


def test_an_error_of_a_read_comes_out_where_it_is_read():
    def read() -> Iterator[bytes]:
        yield b"first"
        raise Changed("it did")

    blocks = watched(read, 5)
    assert next(blocks) == b"first"
    with pytest.raises(Changed, match="it did"):
        next(blocks)

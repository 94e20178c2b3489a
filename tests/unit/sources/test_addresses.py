"""An address means one file, those of a directory, or those that a glob matches."""

from __future__ import annotations

from pathlib import Path

from snaketron.log import UserError
from snaketron.sources.addresses import list_address
from snaketron.sources.hub import list_hub_address
from snaketron.sources.patience import Patience
from tests.unit.sources.contents import LINES

import fsspec
import pytest

PATIENCE = Patience(retries=1, stall_timeout=60, first_pause=0.01)


def addresses(pattern: str) -> list[str]:
    return [found.address for found in list_address(pattern, "corpora[0].paths[0]", PATIENCE)]


def test_an_address_is_a_file_a_directory_or_a_glob(store: None):
    assert addresses("memory://raw/b.jsonl") == ["memory:///raw/b.jsonl"]
    assert addresses("memory://raw") == ["memory:///raw/b.jsonl", "memory:///raw/deep/a.parquet"]
    assert addresses("memory://raw/**/*.parquet") == ["memory:///raw/deep/a.parquet"]


def test_what_lies_in_a_directory_and_is_not_read_is_named(store: None, caplog: pytest.LogCaptureFixture):
    for name in ("c.jsonl.lz4", "deep/e.csv", "deep/f.txt"):
        fsspec.filesystem("memory").pipe(f"/raw/{name}", b"")
    caplog.set_level("INFO")
    assert addresses("memory://raw") == ["memory:///raw/b.jsonl", "memory:///raw/deep/a.parquet"]
    assert caplog.messages == [
        "corpora[0].paths[0]: not read: .c.jsonl, .tmp/d.jsonl, README.md, c.jsonl.lz4, deep/e.csv and 1 more"
    ]


def test_a_key_with_a_bracket_is_named_by_itself_or_by_a_glob(store: None):
    system = fsspec.filesystem("memory")
    for name in ("data[1].jsonl", "data1.jsonl", "what?.jsonl"):
        system.pipe(f"/keys/{name}", b"")
    assert addresses("memory://keys/data[1].jsonl") == ["memory:///keys/data[1].jsonl"]
    assert addresses("memory://keys/data[[]*.jsonl") == ["memory:///keys/data[1].jsonl"]
    assert addresses("memory://keys/data[12].jsonl") == ["memory:///keys/data1.jsonl"]
    assert len(addresses("memory://keys/*")) == len(addresses("memory://keys")) == 3


def test_files_of_this_machine_have_an_address_too(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert addresses(f"file://{tmp_path}/*.jsonl") == [f"file://{tmp_path}/a.jsonl"]
    assert addresses(f"file://{tmp_path}") == [f"file://{tmp_path}/a.jsonl"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://raw/none", "corpora[0].paths[0]: no .jsonl, "),
        ("memory://raw/*.txt", "corpora[0].paths[0]: no .jsonl, "),
        ("memory://raw/*.md", "corpora[0].paths[0]: memory:///raw/README.md is none of .jsonl, "),
        ("https://host/a.csv", "corpora[0].paths[0]: https://host/a.csv is none of .jsonl, "),
        ("https://host/directory/", "corpora[0].paths[0]: https://host/directory/ is none of .jsonl, "),
        ("hf://models/lab/math/a.jsonl", "corpora[0].paths[0]: hf://models/lab/math/a.jsonl"),
    ],
)
def test_an_address_without_a_file_that_can_be_read_is_refused(address: str, message: str, store: None):
    with pytest.raises(UserError) as error:
        (list_hub_address if address.startswith("hf:") else list_address)(
            address, "corpora[0].paths[0]", PATIENCE
        )
    assert str(error.value).startswith(message)

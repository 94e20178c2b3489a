"""A source has these files of a data set of the hub, asked with the real client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from snaketron.config import Hub
from tests.fake_hub import FakeHub
from tests.unit.sources.contents import LINES, sha256

import pytest

# The hub. Its clients read the endpoint once, so they run in a process of their own.
CARD = b"""---
configs:
- {config_name: High-Quality, data_files: High-Quality/*.parquet}
- {config_name: High-Quality-Synthetic, data_files: High-Quality-Synthetic/*.parquet}
- {config_name: "4plus", data_files: [{split: train, path: 4plus/train-*}, {split: test, path: 4plus/test-*}]}
- {config_name: 4plus_MIND, data_files: 4plus_MIND/*.parquet}
---
"""

CURATED = {
    path: path.encode()
    for path in (
        "High-Quality/part_0.parquet",
        "High-Quality/part_1.parquet",
        "High-Quality-Synthetic/part_0.parquet",
        "4plus/train-00000-of-00002.parquet",
        "4plus/train-00001-of-00002.parquet",
        "4plus/test-00000-of-00001.parquet",
        "4plus_MIND/part_0.parquet",
    )
}

DEFAULT = b"""---
configs:
- {config_name: b, data_files: b.jsonl}
- {config_name: a, data_files: a.jsonl, default: true}
---
"""

CASES = {
    "exact": Hub(repository="lab/curated", configuration="High-Quality"),
    "longer": Hub(repository="lab/curated", configuration="High-Quality-Synthetic"),
    "train": Hub(repository="lab/curated", configuration="4plus"),
    "test": Hub(repository="lab/curated", configuration="4plus", split="test"),
    "mind": Hub(repository="lab/curated", configuration="4plus_MIND"),
    "misspelt": Hub(repository="lab/curated", configuration="High-quality"),
    "another": Hub(repository="lab/curated", configuration="zzz"),
    "no_such_split": Hub(repository="lab/curated", configuration="High-Quality", split="validation"),
    "none_named": Hub(repository="lab/curated"),
    "has_default": Hub(repository="lab/default"),
    "plain": Hub(repository="lab/plain"),
    "plain_test": Hub(repository="lab/plain", split="test"),
    "plain_config": Hub(repository="lab/plain", configuration="en"),
    "old": Hub(repository="lab/plain", revision="v1"),
    "no_revision": Hub(repository="lab/plain", revision="v2"),
    "program": Hub(repository="lab/program"),
    "table": Hub(repository="lab/table"),
    "gated": Hub(repository="lab/gated"),
    "missing": Hub(repository="lab/missing"),
    "no_owner": Hub(repository="parquet"),
}

ASK = """
import json, sys
from snaketron.config import Hub
from snaketron.sources.hub import list_hub
from snaketron.sources.patience import Patience
from snaketron.log import UserError
answers = {}
for name, hub in json.load(sys.stdin).items():
    try:
        commit, found = list_hub(Hub(**hub), "corpora[0].hub", Patience(0, 60))
        answers[name] = [commit, [[f.address, f.path, f.size, f.sha256] for f in found]]
    except UserError as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.commit("lab/curated", {"README.md": CARD} | CURATED)
        hub.commit("lab/default", {"README.md": DEFAULT, "a.jsonl": LINES, "b.jsonl": LINES})
        hub.commit("lab/plain", {"data/old.jsonl": LINES}, branch="v1")
        hub.commit("lab/plain", {"data/train.jsonl": LINES, "data/test.jsonl": LINES, "other.txt": b""})
        hub.commit("lab/program", {"program.py": b"import datasets"})
        hub.commit("lab/table", {"train.csv": b"text\na\n"})
        hub.commit("lab/gated", {"train.jsonl": LINES})
        hub.gated.add("lab/gated")
        yield hub


@pytest.fixture(scope="module")
def answers(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `list_hub` answers to each of the cases."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps({name: case.model_dump() for name, case in CASES.items()}),
        env=os.environ | hub.environment(tmp_path_factory.mktemp("hub_cache")),
        cwd=tmp_path_factory.mktemp("empty"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "paths"),
    [
        ("exact", ["High-Quality/part_0.parquet", "High-Quality/part_1.parquet"]),
        ("longer", ["High-Quality-Synthetic/part_0.parquet"]),
        ("train", ["4plus/train-00000-of-00002.parquet", "4plus/train-00001-of-00002.parquet"]),
        ("test", ["4plus/test-00000-of-00001.parquet"]),
        ("mind", ["4plus_MIND/part_0.parquet"]),
    ],
)
def test_a_configuration_and_a_split_are_those_of_exactly_that_name(
    case: str, paths: list[str], answers: dict[str, Any], hub: FakeHub
):
    commit = hub.branches["lab/curated"]["main"]
    root = f"hf://datasets/lab/curated@{commit}"
    content = [path.encode() for path in paths]
    assert answers[case] == [
        commit,
        [[f"{root}/{p}", p, len(c), sha256(c)] for p, c in zip(paths, content, strict=True)],
    ]


def test_without_a_configuration_it_is_the_only_one_or_the_default(answers: dict[str, Any]):
    assert [found[1] for found in answers["has_default"][1]] == ["a.jsonl"]
    assert [found[1] for found in answers["plain"][1]] == ["data/train.jsonl"]
    assert [found[1] for found in answers["plain_test"][1]] == ["data/test.jsonl"]


def test_a_revision_is_pinned_to_its_commit(answers: dict[str, Any], hub: FakeHub):
    commit = hub.branches["lab/plain"]["v1"]
    old = f"hf://datasets/lab/plain@{commit}/data/old.jsonl"
    assert answers["old"] == [commit, [[old, "data/old.jsonl", 14, None]]]  # a small file: no SHA-256 there


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "misspelt",
            "corpora[0].hub.configuration: lab/curated has no 'High-quality'; did you mean 'High-Quality'? "
            "There are High-Quality, High-Quality-Synthetic, 4plus, 4plus_MIND",
        ),
        (
            "another",
            "corpora[0].hub.configuration: lab/curated has no 'zzz'. There are High-Quality, ",
        ),
        (
            "no_such_split",
            "corpora[0].hub.split: lab/curated, configuration High-Quality has no 'validation'. There are ",
        ),
        (
            "none_named",
            "corpora[0].hub.configuration: lab/curated has several; name one of High-Quality, High-Qual",
        ),
        ("plain_config", "corpora[0].hub.configuration: lab/plain has no 'en'. There are default"),
        ("no_revision", "corpora[0].hub: lab/plain at v2: RevisionNotFoundError"),
        ("program", "corpora[0].hub: lab/program: a program makes this data set, which is not run"),
        ("table", "corpora[0].hub: hf://datasets/lab/table@"),
        (
            "gated",
            "corpora[0].hub: lab/gated at main: the hub gives it only to accounts that were given access. "
            "Ask for access on its page, and set HF_TOKEN to a token of that account",
        ),
        (
            "missing",
            "corpora[0].hub: lab/missing at main: the hub has no repository of this name, or it is private. "
            "Correct the name, or set HF_TOKEN",
        ),
        ("no_owner", "corpora[0].hub.repository: 'parquet' is not of the form OWNER/NAME"),
    ],
)
def test_what_cannot_be_listed_says_why(case: str, message: str, answers: dict[str, Any]):
    assert str(answers[case]).startswith(message)


def test_a_table_says_what_can_be_read(answers: dict[str, Any]):
    assert answers["table"].endswith(
        "/train.csv is none of .jsonl, .ndjson or .json (also .gz, .zst, .bz2 or .xz), .parquet or .arrow"
    )

"""What the lock file says of hub data sets and other addresses, asked with the real clients."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snaketron.config import Config, Corpus, Hub
from snaketron.files import write_json
from snaketron.log import UserError
from snaketron.sources.addresses import Found, list_address
from snaketron.sources.hub import list_hub_address
from snaketron.sources.listing import file_names, lock_sources
from snaketron.sources.lockfile import lock_text, read_lock
from snaketron.sources.patience import Patience
from snaketron.sources.shards import shards
from tests.fake_hub import FakeHub
from tests.faulty_server import Fault, FaultyServer

import fsspec
import pytest

PATIENCE = Patience(retries=1, stall_timeout=60, first_pause=0.01)
REPOSITORY = Path(__file__).parents[3]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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
LINES = b'{"text": "a"}\n'
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


# The command


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(REPOSITORY / "config")
    (tmp_path / "scripts").symlink_to(REPOSITORY / "scripts")
    return tmp_path


def command(work: Path, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "scripts/lock_sources.py", *arguments],
        cwd=work,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


CORPORA = """
corpora:
- {name: docs, paths: [data/sample/docs/part_0.jsonl]}
- {name: code, paths: [data/sample/code/part_0.jsonl]}
- {name: packages, paths: [data/sample/packages/part_0.jsonl]}
- name: math
  hub: {repository: lab/math, configuration: CONFIGURATION}
- {name: web, paths: ["hf://datasets/lab/math@main/b", "hf://datasets/lab/math/**/part_*.jsonl"]}
- {name: requests, paths: [data/sample/requests/part_0.jsonl]}
"""


def test_the_command_lists_what_the_merged_configuration_asks_for(work: Path):
    with FakeHub() as hub:
        configs = b"- {config_name: a, data_files: a/*}\n- {config_name: b, data_files: b/*}\n"
        card = b"---\nconfigs:\n" + configs + b"---\n"
        files = {"README.md": card, "a/part_0.jsonl": LINES, "b/part_0.jsonl": LINES + LINES}
        commit = hub.commit("lab/math", files)
        environment = hub.environment(work / "hub_cache")
        overlays = ("--configfile", "mine.yaml", "over.yaml")
        (work / "mine.yaml").write_text(CORPORA)
        (work / "over.yaml").write_text("sources_lock: locked.json\n")

        status, said = command(work, *overlays, environment=environment)
        assert status == 1
        assert "error: corpora[3].hub.configuration: lab/math has no 'CONFIGURATION'" in said
        assert not (work / "locked.json").exists()

        limited = CORPORA.replace("CONFIGURATION}", "b}\n  max_files: 1")
        (work / "mine.yaml").write_text(limited)
        status, said = command(work, *overlays, environment=environment)
        assert (status, said.count("reading 1 file, ")) == (0, 2), said  # what math reads, web knows
        address = f"hf://datasets/lab/math@{commit}"
        lock = json.loads((work / "locked.json").read_text())
        assert lock["version"] == 1 and list(lock["sources"]) == ["math", "web"]
        assert lock["sources"]["math"]["revision"] == commit
        assert lock["sources"]["math"]["files"] == [
            {
                "name": "part_0.jsonl",
                "address": f"{address}/b/part_0.jsonl",
                "size": 28,
                "sha256": sha256(LINES + LINES),
                "etag": hashlib.sha1(b"blob 28\0" + LINES + LINES).hexdigest(),
            }
        ]
        # In the order of the addresses, and what two of them name is one file.
        names = [file["name"] for file in lock["sources"]["web"]["files"]]
        assert names == ["b_part_0.jsonl", "a_part_0.jsonl"]

        # The branch moves; what is listed stays, until it is asked for.
        before = (work / "locked.json").read_bytes()
        moved = hub.commit("lab/math", files | {"b/part_1.jsonl": LINES})
        hub.requests.clear()
        status, said = command(work, *overlays, environment=environment)
        assert (status, hub.requests, (work / "locked.json").read_bytes()) == (0, [], before), said
        assert f"math: listed already, 1 file, 28 bytes, revision {commit}; --update lists it again" in said
        # More files are asked for: they are those of the pinned commit.
        (work / "mine.yaml").write_text(limited.replace("max_files: 1", "max_files: 9"))
        status, said = command(work, *overlays, environment=environment)
        assert (status, f"math: 1 file, 28 bytes, revision {commit} (0 added" in said) == (0, True), said
        status, said = command(work, *overlays, "--update", "--source", "math", environment=environment)
        assert status == 0
        assert f"math: 2 files, 42 bytes, revision {moved} (1 added, 0 removed, 0 changed)" in said
        after = json.loads((work / "locked.json").read_text())["sources"]
        assert after["web"] == lock["sources"]["web"] and len(after["math"]["files"]) == 2


def test_the_command_says_what_is_wrong_with_the_configuration(work: Path):
    (work / "mine.yaml").write_text("corpora: [{name: web, paths: [], text: body}]")
    status, said = command(work, "--configfile", "mine.yaml")
    assert status == 1 and "error: the configuration is wrong.\ncorpora[0].text: unknown key" in said
    status, said = command(work, "--configfile", "none.yaml")
    assert status == 1 and "error: --configfile none.yaml: no such file" in said
    assert "Traceback" not in said


# Other addresses


def config(*corpora: Corpus) -> Config:
    blend = [{"corpus": corpora[0].name, "weight": 1}]
    return Config(corpora=corpora, pretrain={"phases": [{"name": "one", "tokens": 100_000, "blend": blend}]})


def web(*paths: str) -> Corpus:
    return Corpus(name="web", paths=list(paths))


def addresses(pattern: str) -> list[str]:
    return [found.address for found in list_address(pattern, "corpora[0].paths[0]", PATIENCE)]


@pytest.fixture
def store() -> None:
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in ("raw/b.jsonl", "raw/deep/a.parquet", "raw/README.md", "raw/.c.jsonl", "raw/.tmp/d.jsonl"):
        system.pipe(f"/{path}", path.encode())


def test_an_address_is_a_file_a_directory_or_a_glob(store: None):
    assert addresses("memory://raw/b.jsonl") == ["memory:///raw/b.jsonl"]
    assert addresses("memory://raw") == ["memory:///raw/b.jsonl", "memory:///raw/deep/a.parquet"]
    assert addresses("memory://raw/**/*.parquet") == ["memory:///raw/deep/a.parquet"]


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


def test_a_file_whose_hash_is_not_told_is_read_however_the_connection_breaks(work: Path):
    content = LINES * 5000
    with FaultyServer() as server:
        address = server.put(
            "/files/a b.jsonl", content, Fault("drop", after=30_000), Fault("status", status=503)
        )
        address = address.replace(" ", "%20") + "?download=true"
        corpus = web(address)
        lock_sources(config(corpus), patience=Patience(3, 60, 0.01))
        assert server.starts("/files/a b.jsonl") == [0, 30_000, 30_000]
    lock = read_lock("sources.lock.json")
    assert lock.sources["web"] == {
        "request": {"paths": [address]},
        "revision": None,
        "files": [
            {
                "name": "a_b.jsonl",
                "address": address,
                "size": 70_000,
                "sha256": sha256(content),
                "etag": hashlib.md5(content).hexdigest(),
            }
        ],
    }
    assert shards(corpus, "corpora[0]", lock) == {"a_b": ["<data>/raw/web/a_b.jsonl"]}


def test_the_lock_is_the_same_however_often_and_in_which_order_it_is_made(work: Path, store: None):
    a, b = web("memory://raw"), Corpus(name="deep", paths=["memory://raw/deep"])
    lock_sources(config(a, b))
    first = Path("sources.lock.json").read_bytes()
    Path("sources.lock.json").unlink()
    lock_sources(config(b, a), names=["web"])
    assert list(json.loads(Path("sources.lock.json").read_bytes())["sources"]) == ["web"]
    lock_sources(config(b, a))
    assert Path("sources.lock.json").read_bytes() == first
    lock_sources(config(b, a), update=True)
    assert Path("sources.lock.json").read_bytes() == first
    assert first == lock_text(read_lock("sources.lock.json")).encode()


def test_another_request_is_listed_again_and_other_entries_stay(work: Path, store: None):
    write_json(Path("sources.lock.json"), {"version": 1, "sources": {"old": {"request": {}, "files": []}}})
    with pytest.raises(UserError, match=r"sources.lock.json is not a lock file \(KeyError: 'revision'\)"):
        lock_sources(config(web("memory://raw")))
    old = {"request": {"paths": ["s3://x"]}, "revision": None, "files": []}
    write_json(Path("sources.lock.json"), {"version": 1, "sources": {"old": old}})
    lock_sources(config(web("memory://raw/deep")))
    lock_sources(config(web("memory://raw")))
    lock = read_lock("sources.lock.json")
    assert lock.sources["old"] == old
    # The file that was listed before keeps its name, so nobody has to download it again.
    assert list(lock.files("web")) == ["b.jsonl", "a.parquet"]


def test_only_sources_that_lie_elsewhere_can_be_named(work: Path):
    with pytest.raises(UserError, match=r"--source wbe: nothing of that name lies elsewhere; what does: web"):
        lock_sources(config(web("memory://raw")), names=["wbe"])


# Names of downloaded files


def names(*paths: str, **known: str) -> list[str]:
    return file_names([Found(f"s3://{path}", path) for path in paths], known)


def test_a_name_is_the_path_below_what_all_files_share():
    assert names("bucket/x/a.parquet") == ["a.parquet"]
    assert names("bucket/x/2024/a-1.parquet", "bucket/x/2025/A 2.jsonl.gz") == [
        "2024_a_1.parquet",
        "2025_a_2.jsonl.gz",
    ]
    assert names("/x/v1.2.json", "other/b.json") == ["x_v1_2.json", "other_b.json"]


def test_no_two_files_get_one_name():
    made = names("b/a_b.parquet", "b/a/b.parquet", "b/A/b.parquet", "b/a-b.jsonl", "b/c.parquet")
    assert made[-1] == "c.parquet"
    stems = [name.split(".")[0] for name in made]
    assert len(set(stems)) == 5 and all(stem.startswith("a_b_") for stem in stems[:4])
    assert made == names("b/a_b.parquet", "b/a/b.parquet", "b/A/b.parquet", "b/a-b.jsonl", "b/c.parquet")


def test_a_long_path_becomes_a_name_that_file_systems_take():
    first, second = names("b/" + "x" * 300 + "/1.parquet", "b/" + "x" * 300 + "/2.parquet", "b/c.parquet")[:2]
    assert first != second and max(len(first), len(second)) < 170


def test_a_known_file_keeps_its_name_and_others_do_not_take_it():
    known = {"s3://b/deep/a.parquet": "a.parquet"}
    assert file_names([Found("s3://b/deep/a.parquet", "b/deep/a.parquet")], known) == ["a.parquet"]
    kept, new = file_names([Found(f"s3://{p}", p) for p in ("b/deep/a.parquet", "b/a.parquet")], known)
    assert kept == "a.parquet" and new.startswith("a_") and new != "a.parquet"
    moved = Found("hf://datasets/lab/math@1111/a.parquet", "a.parquet")
    assert moved.location == "hf://datasets/lab/math/a.parquet"

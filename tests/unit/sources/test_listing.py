"""The lock file: what the command writes of all sources, and how it names files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from snaketron.config import Config, Corpus
from snaketron.files import write_json
from snaketron.log import UserError
from snaketron.sources.addresses import Found
from snaketron.sources.listing import file_names, lock_sources
from snaketron.sources.lockfile import lock_text, read_lock
from snaketron.sources.patience import Patience
from snaketron.sources.shards import shards
from tests.fake_hub import FakeHub
from tests.faulty_server import Fault, FaultyServer
from tests.unit.sources.contents import LINES, sha256

import pytest

REPOSITORY = Path(__file__).parents[3]


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


def config(*corpora: Corpus) -> Config:
    blend = [{"corpus": corpora[0].name, "weight": 1}]
    return Config(corpora=corpora, pretrain={"phases": [{"name": "one", "tokens": 100_000, "blend": blend}]})


def web(*paths: str) -> Corpus:
    return Corpus(name="web", paths=list(paths))


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


def test_a_name_that_repeats_itself_gets_a_hash():
    """Snakemake refuses the shard `____________________`."""
    odd = f"b/{'二' * 20}.parquet"
    digest = hashlib.sha256(f"s3://{odd}".encode()).hexdigest()[:8]
    assert names(odd, "b/c.parquet") == [f"{'_' * 21}{digest}.parquet", "c.parquet"]


def test_a_known_file_keeps_its_name_and_others_do_not_take_it():
    known = {"s3://b/deep/a.parquet": "a.parquet"}
    assert file_names([Found("s3://b/deep/a.parquet", "b/deep/a.parquet")], known) == ["a.parquet"]
    kept, new = file_names([Found(f"s3://{p}", p) for p in ("b/deep/a.parquet", "b/a.parquet")], known)
    assert kept == "a.parquet" and new.startswith("a_") and new != "a.parquet"
    moved = Found("hf://datasets/lab/math@1111/a.parquet", "a.parquet")
    assert moved.location == "hf://datasets/lab/math/a.parquet"

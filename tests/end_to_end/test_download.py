"""The workflow fetches what the lock file lists; killed in the middle, it goes on from there."""

from __future__ import annotations

import gzip
import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from snaketron.data import tokenizer
from snaketron.files import partial
from snaketron.lineage.record import read
from snaketron.lineage.walk import record_of
from snaketron.wording import size_text
from tests.conftest import Workspace
from tests.end_to_end.processes import run_until
from tests.fake_hub import FakeHub
from tests.faulty_server import Fault

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

TEXT = "".join(f'{{"text": "Document {i}, of a corpus that lies elsewhere."}}\n' for i in range(20_000))
PARTS = {f"data/train-0000{i}-of-00002.jsonl.gz": gzip.compress(TEXT.encode(), 0, mtime=i) for i in range(2)}
CORPORA = """
corpora:
  - {name: docs, paths: [data/sample/docs/part_0.jsonl]}
  - {name: code, paths: [data/sample/code/part_0.jsonl]}
  - {name: web, hub: {repository: lab/web, revision: v1}}
"""
TARGETS = [f"data/tokens/web/train_0000{i}_of_00002.json" for i in range(2)]
FILES = [f"data/raw/web/train_0000{i}_of_00002.jsonl.gz" for i in range(2)]


def pq_bytes(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.commit("lab/web", PARTS, branch="v1")
        yield hub


@pytest.fixture
def web(workspace: Workspace, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A working directory with a corpus of the hub."""
    for name, value in hub.environment(workspace.path / "hub_cache").items():
        monkeypatch.setenv(name, value)
    workspace.write("corpora.yaml", CORPORA)
    workspace.overlays = (*workspace.overlays, "corpora.yaml")
    return workspace


def lock(web: Workspace, *options: str) -> str:
    result = web.run(sys.executable, "scripts/lock_sources.py", *options, "--configfile", *web.overlays)
    assert result.status == 0, result.output
    return result.output


def test_a_download_that_is_killed_goes_on_where_it_ended(web: Workspace, hub: FakeHub):
    assumed = "data/tokens/web/unlisted.json"  # one file, since nobody knows yet how many there are
    planned = web.snakemake("-n", assumed)
    assert planned.status == 0 and planned.jobs["download"] == 1
    said = "corpora[2] (web): its files are not listed in sources.lock.json yet"
    assert f"One file of each is assumed: {said}" in planned.output
    refused = web.snakemake(assumed)
    assert refused.status == 1 and said in refused.output
    command = "python scripts/lock_sources.py --configfile tests/config/micro.yaml corpora.yaml"
    assert command in refused.output and "Traceback" not in refused.output

    lock(web)
    hub.requests.clear()
    dry = web.snakemake("-n", *TARGETS)
    assert f"To download: web 2 files, {size_text(sum(map(len, PARTS.values())))}\n" in dry.output
    assert dry.jobs["download"] == 2 and dry.jobs["tokenize_shard"] == 2
    assert hub.requests == []  # the graph is built without the network

    # Both files stop in the middle, and the run is killed.
    stores = [hub.store(content) for content in PARTS.values()]
    for store in stores:
        hub.faults[store] = [Fault("stall", after=300_000)]
    partials = [partial(web.path / file) for file in FILES]
    run_until(
        web,
        web.command("--cores", "2", *FILES),
        lambda: all(p.exists() and p.stat().st_size == 300_000 for p in partials),
        signal.SIGKILL,
    )
    assert not any((web.path / file).exists() for file in FILES)

    hub.requests.clear()
    result = web.snakemake(*FILES)
    assert result.status == 0, result.output[-5000:]
    assert [hub.starts(store) for store in stores] == [[300_000], [300_000]]
    for file, content in zip(FILES, PARTS.values(), strict=True):
        assert (web.path / file).read_bytes() == content
        log = (web.path / f"logs/download/web/{file.rpartition('/')[2]}.log").read_text()
        assert "300 kB of 1.2 MB are here from an earlier attempt" in log
    again = web.snakemake("-n", *FILES)
    assert "Nothing to be done" in again.output and "To download" not in again.output


def test_of_another_commit_only_what_changed_is_fetched(web: Workspace, hub: FakeHub):
    lock(web)
    assert web.snakemake(*FILES).jobs == {"download": 2}
    hub.commit("lab/web", PARTS | {"data/train-00001-of-00002.jsonl.gz": b"other"}, branch="v1")
    assert "(0 added, 0 removed, 1 changed)" in lock(web, "--update")
    hub.requests.clear()
    assert web.snakemake(*FILES).jobs == {"download": 1}
    assert (web.path / FILES[1]).read_bytes() == b"other"
    assert [r.path for r in hub.requests if r.path.startswith("/store/")] == [hub.store(b"other")]


def test_the_data_of_a_task_is_fetched_by_a_rule_and_read_like_any_directory(web: Workspace, hub: FakeHub):
    """Where the records of the downloads lie, the library of data sets does not take them for data."""
    rows = {"test": [{"question": "Who?"}], "dev": [{"question": "Where?"}, {"question": "When?"}]}
    files = {
        f"one/{split}-00000-of-00001.parquet": pq_bytes(pa.Table.from_pylist(of))
        for split, of in rows.items()
    }
    listed = [{"split": split, "path": f"one/{split}-*"} for split in rows]
    card = yaml.safe_dump({"configs": [{"config_name": "one", "data_files": listed}]})
    commit = hub.commit("lab/quiz", files | {"README.md": f"---\n{card}---\n".encode()})
    web.write("corpora.yaml", CORPORA + "eval: {tasks: [{name: mmlu_anatomy, data: lab/quiz}]}\n")
    lock(web)
    planned = web.snakemake("-n", "eval/sft.json")
    assert planned.status == 0 and planned.jobs["download_task_data"] == 3, planned.output
    directory = web.path / f"data/hub/datasets/lab/quiz@{commit}"
    made = web.snakemake(*(str(directory.relative_to(web.path) / name) for name in (*files, "README.md")))
    assert made.status == 0 and made.jobs == {"download_task_data": 3}, made.output[-5000:]
    for split, of in rows.items():
        found = datasets.load_dataset(str(directory), "one", split=split, cache_dir=str(web.path / "cache"))
        assert found.to_list() == of


def test_a_tokenizer_of_the_hub_is_fetched_by_rules_and_needs_no_network_after_them(
    web: Workspace, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
):
    """The downloads may run where there is a network, and what uses them where there is none."""
    small = tokenizer.train(["some text again and again"], 270)
    template = (web.path / "config/chat_template.jinja").read_text()
    config = tokenizer.trained_config() | {"chat_template": template}
    files = {"tokenizer.json": small.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    commit = hub.commit("lab/tiny", files | {"model.safetensors": b"weights"})
    web.write("corpora.yaml", CORPORA + "tokenizer: {path: lab/tiny, chat_template: null}\n")
    targets = ["data/tokenizer/chat_template.jinja", "data/tokenizer/tokenizer.json"]
    lock(web, "--source", "web")
    planned, refused = web.snakemake("-n", *targets), web.snakemake(*targets)
    assert (planned.status, refused.status) == (0, 1)
    assert planned.jobs["download_model"] == 3  # the files that tokenizers usually have
    for said in (planned.output, refused.output):
        assert "tokenizer.path: lab/tiny is no directory here" in said
    lock(web)
    assert web.snakemake(*targets, "--until", "download_model").jobs == {"download_model": 2}

    hub.commits.clear()
    hub.requests.clear()
    assert web.snakemake(*targets).jobs == {"build_tokenizer": 1, "install_chat_template": 1}
    assert hub.requests == []
    assert tokenizer.tokenizer_info(web.path / "data/tokenizer").vocab_size == 270
    assert (web.path / targets[0]).read_text() == template
    monkeypatch.chdir(web.path)
    for entry in read(Path("data/tokenizer/record.json")).inputs:
        found = record_of(entry)
        assert found and found[1].inputs[0].path == f"hf://lab/tiny@{commit}/{entry.file.name}"

"""Curation through the workflow: what is left, what a change runs again, and a kill in the middle."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from tests.conftest import Workspace, make_workspace
from tests.end_to_end.processes import exists, kill_in
from tests.end_to_end.test_kill import contents
from tests.unit.data.curation.curated import changed, language_model, words

import pyarrow.parquet as pq
import pytest

CONFIG = """
corpora:
  - name: web
    paths: [raw/web]
    metadata_fields: [url]
    curation:
      filters:
        - {name: regex, options: {pattern: "SECRET"}}
        - {name: language, options: {model: lid.bin, languages: [en]}}
        - {name: gopher_quality, options: {min_doc_words: 20, min_stop_words: 1}}
      exact_dedup: all
      minhash_dedup: all
      decontaminate: true
      pii: true
  - {name: code, paths: [raw/code], curation: {exact_dedup: all, minhash_dedup: all}}
  - {name: plain, paths: [raw/plain], curation: {filters: [{name: regex, options: {pattern: SECRET}}]}}
curation: {evaluation: [swans.jsonl], minhash: {num_buckets: 2, hashes_per_bucket: 4}}
tokenizer: {text: [raw/web/a.jsonl], vocab_size: 400}
pretrain:
  phases:
    - {name: broad, tokens: 200000, blend: [{corpus: web, weight: 1}, {corpus: code, weight: 1}]}
"""
TARGETS = [f"data/curated/{shard}.parquet" for shard in ("web/a", "web/b", "code/a", "plain/a")]
QUESTION = "how many of the seven swans that swam on the lake at noon had come back by evening"
# The model knows these words; the others make each text another.
A, B, C, D, E, F = (f"the house is old {words(letter, 200)} the water" for letter in "abcdef")
GERMAN = f"das haus ist alt {words('g')} das wasser"
RAW = {
    "web/a": [A, B, "SECRET " + C, A, GERMAN],
    "web/b": [changed(B, 100), f"{D} {QUESTION}", f"{E} joe@corp.com", "the house is old", C],
    "code/a": [C, changed(A, 50), F, F],
    "plain/a": [F, F, "SECRET"],
}
LEFT = {
    "web/a": [A, B],
    "web/b": [f"{E} email@example.com", C],
    "code/a": [F],
    "plain/a": [F, F],
}
REMOVED = {
    "web/a": {"regex SECRET": 1, "exact duplicate": 1, "language": 1},
    "web/b": {"near duplicate": 1, "contaminated: swans.jsonl": 1, "gopher_quality: gopher_short_doc": 1},
    "code/a": {"exact duplicate": 2, "near duplicate": 1},
    "plain/a": {"regex SECRET": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A run with every step, in a workspace that the tests copy."""
    workspace = make_workspace(tmp_path_factory.mktemp("curation") / "work")
    workspace.overlays = ("curation.yaml",)
    workspace.write("curation.yaml", CONFIG)
    language_model(workspace.path / "lid.bin")
    workspace.write("swans.jsonl", json.dumps({"text": QUESTION}) + "\n")
    for shard, texts in RAW.items():
        rows = [{"text": text, "url": f"u{i}"} for i, text in enumerate(texts)]
        workspace.write(f"raw/{shard}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    result = workspace.snakemake(*TARGETS)
    assert result.status == 0, result.output[-5000:]
    assert result.jobs == {
        "build_tokenizer": 1,
        "filter_shard": 4,
        "exact_signature": 3,
        "exact_find": 1,
        "minhash_signature": 3,
        "minhash_buckets": 2,
        "minhash_cluster": 1,
        "decontamination_index": 1,
        "curate_shard": 4,
    }
    return workspace


@pytest.fixture
def copy(finished: Workspace, tmp_path: Path) -> Workspace:
    path = tmp_path / "work"
    shutil.copytree(finished.path, path, symlinks=True)
    return Workspace(path, finished.overlays)


@pytest.mark.parametrize("shard", RAW)
def test_what_is_left_and_what_the_record_says(finished: Workspace, shard: str):
    rows = pq.read_table(finished.path / f"data/curated/{shard}.parquet").to_pylist()
    assert [row["text"] for row in rows] == LEFT[shard]
    assert {row["file"] for row in rows} == {f"raw/{shard}.jsonl"}
    if shard.startswith("web"):
        assert [row["url"] for row in rows] == [f"u{row['row'] - 1}" for row in rows]
    counts = json.loads((finished.path / f"data/curated/{shard}.json").read_text())["counts"]
    assert {reason: entry["documents"] for reason, entry in counts["removed"].items()} == REMOVED[shard]
    assert counts["kept"]["documents"] == len(LEFT[shard])


def test_what_is_left_is_tokenized_and_knows_where_it_came_from(copy: Workspace):
    result = copy.snakemake("data/tokens/web/b.json")
    assert result.status == 0, result.output[-3000:]
    records = [copy.path / f"data/{stage}/web/b.json" for stage in ("curated", "tokens")]
    curated, tokens = (json.loads(record.read_text())["counts"] for record in records)
    assert sum(tokens[s]["tokens"] for s in ("train", "valid", "test")) == curated["kept"]["tokens"]
    places = pq.read_table(copy.path / "data/tokens/web/b.parquet").to_pylist()
    assert sorted((p["file"], p["row"], p["url"]) for p in places) == [
        ("raw/web/b.jsonl", 3, "u2"),
        ("raw/web/b.jsonl", 5, "u4"),
    ]


def test_a_shard_of_which_nothing_is_left_is_tokenized_to_nothing(copy: Workspace):
    copy.write("raw/plain/a.jsonl", json.dumps({"text": "SECRET"}) + "\n")
    result = copy.snakemake("data/tokens/plain/a.json")
    assert result.status == 0, result.output[-3000:]
    assert "plain/a: NOTHING IS LEFT of 1 rows: 1 x regex SECRET" in result.output
    assert (copy.path / "data/tokens/plain/train/a.bin").stat().st_size == 0


def test_nothing_is_left_to_do(finished: Workspace):
    assert finished.snakemake("-n", *TARGETS).jobs == {}


def test_a_corpus_with_filters_only_needs_nothing_else(finished: Workspace):
    result = finished.snakemake("-n", "--forceall", TARGETS[-1])
    assert result.jobs == {"build_tokenizer": 1, "filter_shard": 1, "curate_shard": 1}


GROUP = {"exact_find": 1, "minhash_buckets": 2, "minhash_cluster": 1, "curate_shard": 3}


def test_a_change_runs_what_depends_on_it(copy: Workspace):
    def jobs(*config: str) -> dict[str, int]:
        return copy.snakemake("-n", *TARGETS, config=config).jobs

    assert jobs("curation={num_examples: 7}") == {}
    assert jobs("curation={decontamination_n_grams: 8}") == {"decontamination_index": 1, "curate_shard": 2}
    signatures = {"minhash_signature": 3, "minhash_buckets": 2, "minhash_cluster": 1, "curate_shard": 3}
    assert jobs("curation={minhash: {n_grams: 4}}") == signatures

    (copy.path / "data/tokenizer/tokenizer.json").touch()
    assert jobs() == {}
    shutil.copy(copy.path / "swans.jsonl", copy.path / "more.jsonl")
    assert jobs("curation={evaluation: [swans.jsonl, more.jsonl]}") == {
        "decontamination_index": 1,
        "curate_shard": 2,
    }
    raw = copy.path / "raw/code/a.jsonl"
    raw.write_text(raw.read_text() + json.dumps({"text": D}) + "\n")
    one = {"filter_shard": 1, "exact_signature": 1, "minhash_signature": 1}
    assert jobs() == one | GROUP


def test_another_order_of_the_corpora_lets_other_documents_stay(copy: Workspace):
    """The first two corpora change places: nothing is filtered or hashed again."""
    lines = CONFIG.split("  - ")
    assert lines[5].startswith("{name: code")
    lines[1:6] = [lines[5], *lines[1:5]]
    copy.write("curation.yaml", "  - ".join(lines))
    assert copy.snakemake("-n", *TARGETS).jobs == GROUP
    assert copy.snakemake(*TARGETS).status == 0
    rows = pq.read_table(copy.path / "data/curated/code/a.parquet").to_pylist()
    assert [row["text"] for row in rows] == [C, changed(A, 50), F]


# What a step that is killed leaves half-written, in the order of the steps.
PARTIAL = {
    "curation/filtered": ".*.partial",
    "curation/minhash_signatures": ".*.parts/*",
    "curation/minhash_pairs": ".*.partial",
    "curated": ".*.partial",
}


@pytest.fixture(scope="module")
def killed(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The run, made again from the filters on: killed in one step after the other, then left to end."""
    path = tmp_path_factory.mktemp("killed") / "work"
    shutil.copytree(finished.path, path, symlinks=True)
    workspace = Workspace(path, finished.overlays)
    exact = ("curation/exact_signatures", "curation/exact_duplicates")
    first, *middle, last = PARTIAL
    steps = [first, *exact, *middle, "curation/near_duplicates", last]

    def forget(name: str) -> None:
        for step in steps[steps.index(name) :]:
            shutil.rmtree(path / "data" / step, ignore_errors=True)

    for name, partial in PARTIAL.items():
        forget(name)  # what was begun beside the step before, too
        moment = exists(path, f"data/{name}/*/{partial}")
        command = workspace.command(*TARGETS)
        assert kill_in(workspace, command, moment, lambda name=name: forget(name)) == -signal.SIGKILL, name
    result = workspace.snakemake(*TARGETS)
    assert result.status == 0, result.output[-3000:]
    return workspace


@pytest.mark.parametrize("step", PARTIAL)
def test_a_killed_chain_ends_with_the_same_files(finished: Workspace, killed: Workspace, step: str):
    assert contents(killed.path / "data" / step) == contents(finished.path / "data" / step) != {}
    assert contents(killed.path / "data") == contents(finished.path / "data")
    data = killed.path / "data"
    assert not [*data.rglob(".*.partial"), *data.rglob(".*.parts")]

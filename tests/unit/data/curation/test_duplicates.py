"""Duplicates: which documents are listed, within and across corpora, and that the first one stays."""

from __future__ import annotations

import hashlib
import itertools
import random
from pathlib import Path

from snaketron.config import MinHash
from snaketron.data.curation import exact, minhash
from snaketron.data.curation.folder import Records
from snaketron.log import UserError
from tests.unit.data.curation.curated import Steps, changed, words

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


@pytest.fixture
def steps(tmp_path: Path, tokenizer_dir: Path) -> Steps:
    return Steps(tmp_path, tokenizer_dir)


A, B, C, D, E = (words(letter) for letter in "abcde")


# ------------------------------------------------------------------------------------------- exactly the same


def test_of_equal_documents_the_first_stays(steps: Steps):
    steps.filtered("web/one", [A, B, A])  # again within a shard
    steps.filtered("web/two", [B, C])  # in another shard
    steps.filtered("code/one", [C, D, A, D])  # in another corpus
    found = steps.exact(["web/one", "web/two", "code/one"])
    assert found == {"web/one": [2], "web/two": [0], "code/one": [0, 2, 3]}


def test_the_order_of_shards_comes_before_that_of_rows(steps: Steps):
    """datatrove by itself would keep the copy in the second shard: its row is lower."""
    steps.filtered("web/one", [B, C, A])
    steps.filtered("web/two", [A])
    assert steps.exact(["web/one", "web/two"]) == {"web/one": [], "web/two": [0]}
    assert steps.exact(["web/two", "web/one"]) == {"web/two": [], "web/one": [2]}


def test_a_shard_may_be_empty(steps: Steps):
    steps.filter("web/one", [steps.raw("web/one", [A])], {"name": "regex", "options": {"pattern": "."}})
    steps.filtered("web/two", [A, A])
    assert steps.exact(["web/one", "web/two"]) == {"web/one": [], "web/two": [1]}
    assert steps.near(["web/one", "web/two"]) == {"web/one": [], "web/two": [1]}


def test_exact_duplicates_are_those_of_datatrove(steps: Steps, tmp_path: Path):
    """Its own chain on the same files; it keeps one of equal documents, not always the first."""
    chosen = random.Random(0)
    shards = {f"web/{i}": [words(f"w{chosen.randrange(30)}") for _ in range(20)] for i in range(3)}
    for shard, texts in shards.items():
        steps.filtered(shard, texts)
    found = steps.exact(list(shards))
    config = ExactDedupConfig(content_getter=lambda document: document.text)
    reader = JsonlReader(str(tmp_path / "raw/web"))
    folders = [str(tmp_path / "datatrove" / name) for name in ("signatures", "duplicates", "left")]
    execute(tmp_path, 3, [reader, ExactDedupSignature(folders[0], config)])
    execute(tmp_path, 1, [ExactFindDedups(folders[0], folders[1], config)])
    left = [reader, ExactDedupFilter(folders[1], config), JsonlWriter(folders[2], compression=None)]
    execute(tmp_path, 3, left)
    ours = {texts[i] for shard, texts in shards.items() for i in range(20) if i not in found[shard]}
    assert sum(20 - len(indices) for indices in found.values()) == len(ours)
    theirs = [line for path in Path(folders[2]).glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(theirs) == len(ours) and all(any(text in line for line in theirs) for text in ours)


def test_too_many_shards_for_the_priority_of_datatrove(steps: Steps):
    with pytest.raises(UserError, match="exact_dedup all: 65536 shards, and at most 65535"):
        exact.exact_find([Path("x")] * 65_536, output=Path("all.parquet"), record=Path("all.json"))


# ------------------------------------------------------------------------------------------ nearly the same


def test_of_near_duplicates_the_first_stays(steps: Steps):
    long = words("x", 400)
    steps.filtered("web/one", [A, changed(long, 10), B])
    steps.filtered("web/two", [changed(long, 200), C])
    steps.filtered("code/one", [D, long, changed(long, 390)])
    found = steps.near(["web/one", "web/two", "code/one"])
    assert found == {"web/one": [], "web/two": [0], "code/one": [1, 2]}


def test_a_chain_of_near_duplicates_is_one_cluster_and_its_first_document_stays(steps: Steps):
    """Each differs from the one before it in a few words, the last from the first in most."""
    text, chain = words("x", 300), []
    for start in range(0, 240, 12):
        text = " ".join(f"z{i}" if start <= i < start + 12 else w for i, w in enumerate(text.split()))
        chain.append(text)
    steps.filtered("web/one", [A, *reversed(chain)])
    steps.filtered("web/two", chain)
    found = steps.near(["web/one", "web/two"])
    assert found == {"web/one": list(range(2, 21)), "web/two": list(range(20))}


def test_a_document_shorter_than_an_n_gram_has_no_near_duplicates(steps: Steps):
    steps.filtered("web/one", ["a b c d", "a b c d", "a b c d e", "a b c d e"])
    assert steps.near(["web/one"]) == {"web/one": [3]}
    assert steps_record(steps, "minhash/web/one")["counts"] == {
        "documents": 4,
        "compared": 2,
        "too_short": 2,
    }


def test_exact_duplicates_are_left_out_before_so_that_one_copy_stays(steps: Steps):
    """web/two holds a copy of a text that another nearly repeats; the pairs are made without it."""
    long = words("x", 400)
    near = changed(long, 200)
    steps.filtered("web/one", [near, A])
    steps.filtered("web/two", [B, near, long, long])
    shards = ["web/one", "web/two"]
    assert steps.exact(shards) == {"web/one": [], "web/two": [1, 3]}
    assert steps.near(shards, [steps.root / "exact.parquet"]) == {"web/one": [], "web/two": [2]}
    counts = steps.curate("web/two")
    assert {k: v["documents"] for k, v in counts["removed"].items()} == {
        "exact duplicate": 2,
        "near duplicate": 1,
    }
    assert steps.curate("web/one")["removed"] == {}
    assert steps.texts("curated/web/one") == [near, A] and steps.texts("curated/web/two") == [B]


def steps_record(steps: Steps, name: str) -> dict:
    from snaketron import files

    return files.read_json(steps.root / f"{name}.json")


@pytest.fixture
def crowd() -> dict[str, list[str]]:
    """Three shards with exact, near and unrelated documents, some of them with diacritics."""
    chosen = random.Random(3)
    originals = [words(f"{letter}{accent}", 150) for letter in "pqrst" for accent in ("", "é")]
    shards: dict[str, list[str]] = {f"web/{i}": [] for i in range(3)}
    for texts in shards.values():
        for _ in range(25):
            text = chosen.choice(originals)
            for _ in range(chosen.randrange(5)):
                text = changed(text, chosen.randrange(150))
            texts.append(text if chosen.random() < 0.8 else words(f"n{chosen.randrange(10**6)}q"))
    return shards


def execute(root: Path, tasks: int, pipeline: list) -> None:
    """Run a chain as a user of datatrove does."""
    number = len(list(root.glob("log*")))
    LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(root / f"log{number}")).run()


def test_near_duplicates_are_those_of_datatrove(steps: Steps, tmp_path: Path, crowd: dict[str, list[str]]):
    """Its own chain on the same documents: the same signatures, pairs and clusters, byte by byte.

    It keeps one document of each cluster, and Snaketron keeps the first.
    """
    for shard, texts in crowd.items():
        steps.filtered(shard, texts)
    found = steps.near(list(crowd))

    config, root = MinhashConfig(), tmp_path / "datatrove"
    reader = JsonlReader(str(tmp_path / "raw/web"))
    folders = {name: str(root / name) for name in ("signatures", "pairs", "remove", "left")}
    execute(tmp_path, 3, [reader, MinhashDedupSignature(folders["signatures"], config)])
    buckets = MinhashDedupBuckets(folders["signatures"], folders["pairs"], config=config)
    execute(tmp_path, config.num_buckets, [buckets])
    cluster = MinhashDedupCluster(folders["pairs"], folders["remove"], config, save_cluster_id=True)
    execute(tmp_path, 1, [cluster])
    left = [reader, MinhashDedupFilter(folders["remove"]), JsonlWriter(folders["left"], compression=None)]
    execute(tmp_path, 3, left)

    for rank, shard in enumerate(crowd):
        parts = sorted((root / "signatures").glob(f"bucket_*/{rank:05d}.minhash.sig"))
        assert (tmp_path / f"minhash/{shard}.sig").read_bytes() == b"".join(p.read_bytes() for p in parts)
    for bucket in range(config.num_buckets):
        theirs = (root / f"pairs/{bucket:05d}_00.dups").read_bytes()
        assert (tmp_path / f"pairs/group/{bucket}.dups").read_bytes() == theirs
    clusters: dict[int, list[tuple[int, int]]] = {}
    for rank in range(3):
        rows = np.fromfile(root / f"remove/{rank:06d}.clusters", "<u4").reshape(-1, 2)
        for document, number in rows.tolist():
            clusters.setdefault(number, []).append((rank, document))
    expected = {place for places in clusters.values() for place in sorted(places)[1:]}
    assert {(int(s[-1]), i) for s, indices in found.items() for i in indices} == expected
    num_left = sum(len(p.read_text().splitlines()) for p in Path(folders["left"]).glob("*.jsonl"))
    assert num_left == 75 - len(expected)
    assert len(clusters) >= 5 and any(min(p) != max(p) for p in clusters.values())


def test_leaving_out_exact_duplicates_is_as_if_they_had_not_been_there(steps: Steps, tmp_path: Path, crowd):
    for shard, texts in crowd.items():
        steps.filtered(shard, texts)
    repeated = steps.exact(list(crowd))
    assert sum(map(len, repeated.values())) > 5
    found = steps.near(list(crowd), [steps.root / "exact.parquet"])

    without = Steps(tmp_path / "without", steps.tokenizer)
    kept = {s: [i for i in range(25) if i not in repeated[s]] for s in crowd}
    for shard, texts in crowd.items():
        without.filtered(shard, [texts[i] for i in kept[shard]])
    expected = without.near(list(crowd))
    assert found == {shard: [kept[shard][i] for i in expected[shard]] for shard in crowd}


def test_the_order_in_which_jobs_run_changes_nothing(steps: Steps, tmp_path: Path, crowd):
    def run(root: Path, reverse: bool) -> dict[str, str]:
        steps = Steps(root, tokenizer)
        for shard in reversed(crowd) if reverse else crowd:
            steps.filtered(shard, crowd[shard])
        steps.exact(list(crowd), order=list(reversed(crowd)) if reverse else list(crowd))
        steps.near(list(crowd), [root / "exact.parquet"], reverse=reverse)
        for shard in reversed(crowd) if reverse else crowd:
            steps.curate(shard, pii=True)
        paths = [p for p in root.rglob("*") if p.suffix in (".parquet", ".sig", ".dups")]
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}

    tokenizer = steps.tokenizer
    (tmp_path / "here").mkdir()
    first = run(tmp_path / "here", False)
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(tmp_path / "here", True) == first
    assert len(first) == 3 * 4 + 14 + 2


def test_first_of_a_cluster_by_hand():
    rows = [[(1, 0), (4, 1), (5, 0)], [], [(0, 1), (2, 2), (3, 2), (9, 0)]]
    clusters = [np.array(r, dtype="<u4").reshape(-1, 2) for r in rows]
    assert [r.tolist() for r in minhash.not_first(clusters)] == [[5], [], [0, 3, 9]]


def test_other_settings_are_noticed(steps: Steps):
    steps.filtered("web/one", [A])
    steps.near(["web/one"])
    steps.minhash = MinHash(hashes_per_bucket=5)
    with pytest.raises(UserError, match="made with other settings of MinHash"):
        minhash.minhash_buckets(
            [steps.root / "minhash/web/one.sig"],
            removals=[],
            bucket=0,
            settings=steps.minhash,
            output=steps.root / "0.dups",
            record=steps.root / "0.json",
        )


# ------------------------------------------------------------------------------------------------- the pieces


def test_the_signature_is_that_of_datatrove_for_any_number_of_shingles(tmp_path: Path):
    ours, theirs = minhash.Signature(str(tmp_path)), MinhashDedupSignature(str(tmp_path))
    values = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)
    prime = 2**61 - 1
    values[:6] = [0, 1, prime, prime - 1, prime + 1, 2**64 - 1]
    for count in (1, 5, 255, 256, 257, 2000):
        shingles = values[:count].reshape(-1, 1)
        assert ours.get_signature(shingles) == theirs.get_signature(shingles)
    for text in ("", A, "Naïve É " * 20, "1,5 - 2.5 " * 9):
        assert np.array_equal(ours.get_shingles(text), theirs.get_shingles(text))


def test_records_are_read_in_parts_and_may_be_left_out(tmp_path: Path):
    path = tmp_path / "records"
    np.arange(20, dtype="<u4").tofile(path)

    def odd(chunk: np.ndarray) -> np.ndarray:
        return chunk[chunk % 2 == 1]

    for size, change in itertools.product((4, 12, 1000), (None, odd)):
        records = Records(path, np.dtype("<u4"), 5, 10, change)
        assert records.size == 40
        chunks = list(iter(lambda records=records, size=size: records.read(size), b""))
        expected = [i for i in range(5, 15) if change is None or i % 2]
        assert np.frombuffer(b"".join(chunks), "<u4").tolist() == expected
    with pytest.raises(EOFError, match="shorter than its record says"):
        Records(path, np.dtype("<u4"), 15, 10).read(1000)


def test_a_hash_is_of_the_text_alone():
    block = exact.Signature("memory://x", exact.CONFIG)
    first = block.get_hashes(Document(text=A, id="1", metadata={"file": "a"}), 0)
    second = block.get_hashes(Document(text=A, id="2", metadata={"file": "b"}), 7)
    assert first[0][0] == second[0][0] and second[0][2] == 7

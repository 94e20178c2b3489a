"""Documents with nearly the same text: datatrove's MinHash in three stages.

A signature a shard, pairs of documents that agree in a bucket, and clusters of such pairs. datatrove keeps
the document that its clustering happened to make the root; here the first stays, in the order of the group's
corpora, their shards and rows. Documents that are exact duplicates of others are left out before pairs are
made, so that not both copies vanish; the signatures do not depend on that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from snaketron.config import MinHash
from snaketron.data import curation
from snaketron.data.curation import documents, lists
from snaketron.data.curation.exact import write_duplicates
from snaketron.data.curation.folder import Folder, Records, chunk_records, parts, shard_name
from snaketron.data.curation.words import learn, simplify_text
from snaketron.lineage.record import Record, making
from snaketron.lineage.walk import known
from snaketron.log import UserError

import numpy as np
import pyarrow.parquet as pq
from datatrove.io import DataFolder
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.text import ngrams
from datatrove.utils.typeshelper import Languages

PRIME = np.uint64((1 << 61) - 1)
SHINGLES = 256  # at a time: 112 hashes of each stay in the processor's cache
PAIR = np.dtype([("first", "<u4", 2), ("second", "<u4", 2)])  # (shard, document) of each


def datatrove_config(settings: MinHash) -> MinhashConfig:
    return MinhashConfig(
        n_grams=settings.n_grams,
        num_buckets=settings.num_buckets,
        hashes_per_bucket=settings.hashes_per_bucket,
    )


def record_type(settings: MinHash) -> np.dtype:
    """A document in a bucket of datatrove's signature file."""
    return np.dtype([("hashes", "<u8", settings.hashes_per_bucket), ("document", "<u4")])


class Signature(MinhashDedupSignature):
    """datatrove's block with the same result, faster and in bounded memory for a document of any length."""

    def get_shingles(self, text: str) -> np.ndarray:
        words = self.word_tokenizer.word_tokenize(simplify_text(text, self.config.norm_config))
        hashes = map(self._hash_func, map(" ".join, ngrams(words, self.config.n_grams)))
        return np.fromiter(hashes, np.uint64).reshape((-1, 1))

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        a, b = self.parameters
        smallest = np.full(self.num_hashes, PRIME)
        for start in range(0, len(shingles), SHINGLES):
            values = shingles[start : start + SHINGLES] * a + b
            values = (values & PRIME) + (values >> np.uint64(61))  # below 2 * PRIME, modulo PRIME
            np.minimum(values, values - PRIME, out=values)  # below PRIME: a negative difference wraps around
            np.minimum(smallest, values.min(axis=0), out=smallest)
        return [part.tolist() for part in np.split(smallest, self.config.num_buckets)]


def minhash_signature(filtered: Path, *, settings: MinHash, output: Path, record: Path) -> Record:
    """Write the hashes of each document of a filtered shard: bucket after bucket, each sorted."""
    curation.quiet()
    learn(Languages.english)
    with (
        making("minhash_signature", shard_name(output), outputs={"hashes": output}, record=record) as job,
        parts(output) as directory,
    ):
        Signature(DataFolder(str(directory)), datatrove_config(settings)).run(documents.read(filtered))
        with job.aside["hashes"].open("wb") as file:
            for bucket in range(settings.num_buckets):
                with (directory / f"bucket_{bucket:03d}/00000.minhash.sig").open("rb") as part:
                    shutil.copyfileobj(part, file, 1 << 20)
        read, compared = pq.read_metadata(filtered).num_rows, _num_documents(job.aside["hashes"], settings)
        job.inputs, job.settings = {"filtered": known(filtered)}, settings.model_dump()
        job.counts = {"documents": read, "compared": compared, "too_short": read - compared}
    return job.record


def _num_documents(signature: Path, settings: MinHash) -> int:
    count, rest = divmod(signature.stat().st_size, settings.num_buckets * record_type(settings).itemsize)
    if rest:
        raise UserError(f"{signature}: made with other settings of MinHash; delete it and run again")
    return count


def minhash_buckets(
    signatures: Sequence[Path],
    *,
    removals: Sequence[Path],
    bucket: int,
    settings: MinHash,
    output: Path,
    record: Path,
) -> Record:
    """Write the pairs of documents that agree in all hashes of a bucket, without those in `removals`.

    A document is (number of its signature in `signatures`, index in the filtered shard).
    """
    curation.quiet()
    dtype, removed = record_type(settings), [lists.Lists(path) for path in removals]
    inputs = {}
    for rank, path in enumerate(signatures):
        count = _num_documents(path, settings)
        left_out = [each[shard_name(path)] for each in removed if shard_name(path) in each]
        inputs[f"bucket_{bucket:03d}/{rank:05d}.minhash.sig"] = Records(
            path, dtype, bucket * count, count, _without(left_out[0]) if left_out else None
        )
    name = f"{output.parent.name}/{output.stem}"
    with (
        making("minhash_pairs", name, outputs={"pairs": output}, record=record) as job,
        parts(output) as directory,
    ):
        MinhashDedupBuckets(
            Folder(inputs),
            DataFolder(str(directory)),
            config=datatrove_config(settings),
            lines_to_buffer=chunk_records(dtype, len(signatures)),
        ).run(rank=bucket, world_size=settings.num_buckets)
        (directory / f"{bucket:05d}_00.dups").replace(job.aside["pairs"])
        job.inputs = {"signatures": map(known, signatures), "removals": map(known, removals)}
        job.settings = settings.model_dump() | {"bucket": bucket}
        job.counts = {"pairs": job.aside["pairs"].stat().st_size // PAIR.itemsize}
    return job.record


def _without(removed: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Leave out the documents of a sorted list."""

    def change(chunk: np.ndarray) -> np.ndarray:
        if not len(removed):
            return chunk
        at = np.minimum(np.searchsorted(removed, chunk["document"]), len(removed) - 1)
        return chunk[removed[at] != chunk["document"]]

    return change


def minhash_cluster(
    pairs: Sequence[Path], *, signatures: Sequence[Path], settings: MinHash, output: Path, record: Path
) -> Record:
    """Write, for each shard, the indices of documents that are not the first of their cluster.

    `pairs` are the files of all buckets; `signatures` are in the order that minhash_buckets was given.
    """
    curation.quiet()
    outputs = {"duplicates": output}
    with making("near_duplicates", output.stem, outputs=outputs, record=record) as job:
        inputs = {
            f"{bucket:05d}_00.dups": Records(path, PAIR, 0, path.stat().st_size // PAIR.itemsize)
            for bucket, path in enumerate(pairs)
        }
        found = Folder()
        MinhashDedupCluster(
            Folder(inputs), found, datatrove_config(settings), save_cluster_id=True, lines_to_buffer=4096
        ).run()
        names = [f"{rank:06d}.clusters" for rank in range(len(signatures))]
        repeated = not_first([np.frombuffer(found.written[name], "<u4").reshape(-1, 2) for name in names])
        by_shard = dict(zip(map(shard_name, signatures), repeated, strict=True))
        job.inputs, job.settings = {"pairs": map(known, pairs)}, settings.model_dump()
        job.counts = write_duplicates(job.aside["duplicates"], "near_duplicates", by_shard)
    return job.record


def not_first(clusters: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each shard, the documents that are not the first of their cluster.

    clusters[i] has a row (document, cluster) for each document of shard i in a cluster, in order.
    """
    seen = np.zeros(max((int(rows[:, 1].max()) + 1 for rows in clusters if len(rows)), default=0), dtype=bool)
    repeated = []
    for rows in clusters:
        first = np.zeros(len(rows), dtype=bool)
        first[np.unique(rows[:, 1], return_index=True)[1]] = True
        first &= ~seen[rows[:, 1]]
        seen[rows[:, 1]] = True
        repeated.append(rows[~first, 0])
    return repeated

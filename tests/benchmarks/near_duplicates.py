"""Which share of near duplicates MinHash finds, by the share of words that were changed.

    python tests/benchmarks/near_duplicates.py

Copies of texts of 500 words get other words at random places. A copy is found when it agrees with its
original in all hashes of one bucket. The theory stands beside it: with a share c changed,
q = (1 - c) ^ n_grams of the n-grams stay, the similarity is s = q / (2 - q), and
1 - (1 - s ^ hashes_per_bucket) ^ num_buckets of the copies are found.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator

from snaketron.config import MinHash
from snaketron.data import curation
from snaketron.data.curation.minhash import Signature, datatrove_config
from snaketron.data.curation.words import learn

from datatrove.io import DataFolder
from datatrove.utils.typeshelper import Languages

Raw = argparse.RawDescriptionHelpFormatter
CHANGED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
SETTINGS = (
    MinHash(),
    MinHash(n_grams=3),
    MinHash(n_grams=2),
    MinHash(num_buckets=28),
    MinHash(hashes_per_bucket=4),
    MinHash(n_grams=3, num_buckets=28, hashes_per_bucket=4),
)
WORDS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Raw)
    parser.add_argument("--texts", type=int, default=100, help="copies of each kind (default: %(default)s)")
    count = parser.parse_args().texts
    curation.quiet()
    learn(Languages.english)
    print("n_grams num_buckets hashes_per_bucket | " + "  ".join(f"{c:>11.0%}" for c in CHANGED))
    for settings in SETTINGS:
        row = [f"{measured(settings, c, count):4.0%} ({theory(settings, c):4.0%})" for c in CHANGED]
        name = f"{settings.n_grams:7} {settings.num_buckets:11} {settings.hashes_per_bucket:17}"
        print(f"{name} | " + "  ".join(row))


def measured(settings: MinHash, changed: float, count: int) -> float:
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        block = Signature(DataFolder(folder), datatrove_config(settings))
        for original, copy in pairs(changed, count):
            first, second = (block.get_signature(block.get_shingles(text)) for text in (original, copy))
            found += any(a == b for a, b in zip(first, second, strict=True))
    return found / count


def pairs(changed: float, count: int) -> Iterator[tuple[str, str]]:
    """Texts, and copies in which every word is another one with probability `changed`."""
    chance = random.Random(1234)
    vocabulary = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(5000)]
    for _ in range(count):
        words = chance.choices(vocabulary, k=WORDS)
        copy = [chance.choice(vocabulary) if chance.random() < changed else word for word in words]
        yield " ".join(words), " ".join(copy)


def theory(settings: MinHash, changed: float) -> float:
    q = (1 - changed) ** settings.n_grams
    similarity = q / (2 - q)
    return float(1 - (1 - similarity**settings.hashes_per_bucket) ** settings.num_buckets)


if __name__ == "__main__":
    main()

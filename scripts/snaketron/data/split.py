"""Train, valid or test: decided by the text alone, where the source does not say it of all of its texts."""

from __future__ import annotations

import hashlib


def split_of(text: str, valid_fraction: float, test_fraction: float) -> str:
    """The split of a document, from a hash of its text.

    A text is in the same split in every such corpus, shard and run, so exact duplicates never
    straddle splits. Raising a fraction only moves documents out of train: test takes the lowest
    hashes, valid the highest.
    """
    # surrogatepass: a lone surrogate, which JSON may hold, must not fail here
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    position = (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: exact, and below 1
    if position < test_fraction:
        return "test"
    return "valid" if position >= 1 - valid_fraction else "train"

"""Tokens that were made elsewhere: read once, verified, and recorded in place of what tokenization records.

Nothing is copied: a blend names the files where they lie.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from snaketron.config.data import SPLITS
from snaketron.data.text import binidx
from snaketron.data.tokenizer import Info, known_hashes, tokenizer_info
from snaketron.lineage.record import Entry, Record, making, of_user
from snaketron.log import UserError, logger
from snaketron.settings.registering import TOKENS, RegisterSettings
from snaketron.sources import pairs

import numpy as np

_BLOCK = 16 << 20  # bytes of a .bin at a time
_FIX = "restore the file, or take it out of the configuration"


def register_tokens(prefix: Path, *, settings: RegisterSettings, tokenizer: Path, record: Path) -> Record:
    """Verify a pair of .bin and .idx and write its `record`; neither is written when something is wrong.

    Raises `UserError` with everything that the headers and sizes show; then for an index that contradicts
    itself, another tokenizer, and ids beyond the vocabulary.
    """
    info = tokenizer_info(tokenizer)
    with making(TOKENS, f"{settings.source}/{record.stem}", outputs={}, record=record) as job:
        problems = [
            *pairs.differences(prefix, info.dtype),
            *settings.tokenizer_differences(tokenizer, known_hashes(tokenizer)),
        ]
        if problems:
            raise UserError("\n".join([f"{prefix} cannot be registered:", *problems]))
        bin_path, idx_path = pairs.paths(prefix)
        state = bin_path.stat()  # before it is read: one that is written meanwhile is another file later
        idx_file = of_user(idx_path).renamed("idx")
        pair = binidx.check(prefix, _FIX)
        found = _read(bin_path, idx_path, pair, info)
        job.inputs = {
            "bin": Entry("bin", str(bin_path), found.pop("sha256"), state.st_size, state.st_mtime_ns),
            "idx": idx_file,
            "tokenizer": Entry("tokenizer", str(tokenizer / "tokenizer.json"), info.sha256),
        }
        job.settings = {
            "corpus": settings.source,
            "shard": record.stem,
            "split": settings.split,
            "prefix": str(prefix),
            "tokenizer": info.sha256,
            "tokenizer_known": settings.tokenizer_sha256 is not None,
            "dtype": pair.dtype,
        }
        none = {"documents": 0, "tokens": 0}
        held = {"documents": pair.sequences, "tokens": pair.tokens}
        job.counts = {"dropped": {}, **found, **{s: held if s == settings.split else none for s in SPLITS}}
    return job.record


def _read(bin_path: Path, idx_path: Path, pair: binidx.Pair, info: Info) -> dict[str, Any]:
    """The hash of a .bin, its largest id, and how many of its documents end as this tokenizer ends them.

    Raises `UserError` at the first id that the vocabulary does not have.
    """
    dtype = np.dtype(pair.dtype)
    ends = np.cumsum(_lengths(idx_path, pair.sequences), dtype=np.int64)
    digest, largest, ended, start = hashlib.sha256(), -1, 0, 0
    with bin_path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            ids = np.frombuffer(block, dtype)
            largest = max(largest, int(ids.max()))
            if largest >= info.vocab_size or ids.min() < 0:
                _refuse(bin_path, ids, start, ends, info)
            here = ends[
                np.searchsorted(ends, start, "right") : np.searchsorted(ends, start + len(ids), "right")
            ]
            ended += int(np.count_nonzero(ids[here - 1 - start] == info.eos_id))
            start += len(ids)
    if pair.sequences and not ended:
        logger.warning(
            "%s: none of its %d documents ends with the token %d (%s), as with Megatron's --append-eod: made "
            "without it, or with another tokenizer?",
            bin_path,
            pair.sequences,
            info.eos_id,
            info.eos_token,
        )
    return {"sha256": digest.hexdigest(), "largest_id": largest, "ended_documents": ended}


def _lengths(idx_path: Path, sequences: int) -> np.ndarray:
    return np.fromfile(idx_path, np.int32, sequences, offset=pairs.HEADER.size)


def _refuse(bin_path: Path, ids: np.ndarray, start: int, ends: np.ndarray, info: Info) -> None:
    place = int(np.flatnonzero((ids >= info.vocab_size) | (ids < 0))[0])
    document = int(np.searchsorted(ends, start + place, "right"))
    raise UserError(
        f"{bin_path}: token {start + place:,}, in document {document:,}, is {ids[place]}, and the vocabulary "
        f"has the ids 0 to {info.vocab_size - 1}; it was made with another tokenizer, which tokenizer.path "
        "must name"
    )

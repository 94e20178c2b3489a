"""From the raw files of a shard to token ids: one .bin/.idx pair a split, and where each sequence is from."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketron.config.data import SPLITS
from snaketron.data.drops import AFTER_LIMIT, FILTERED, TOO_LONG, Bad, Drops, place, reject
from snaketron.data.encode import Encoder, Mismatch, Unencodable
from snaketron.data.text import binidx, origins
from snaketron.data.text.reading import Document, Reader, ahead
from snaketron.data.tokenizer import Info, read_tokenizer, tokenizer_info
from snaketron.lineage.record import Entry, Record, making
from snaketron.log import UserError, logger
from snaketron.settings.text import TokenizeSettings
from snaketron.sources.pairs import paths
from snaketron.wording import counted

import numpy as np

NO_TOKENS = "no tokens"  # a normalizer left nothing


def tokenize_shard(
    texts: Sequence[Path],
    *,
    settings: TokenizeSettings,
    tokenizer: Path,
    bins: Mapping[str, Path],
    table: Path,
    record: Path,
    threads: int = 1,
) -> Record:
    """Tokenize the raw files `texts` into a .bin/.idx pair a split, and write `record` last.

    `bins` maps each split to its .bin; `table` is the Parquet file that says where each sequence comes from.
    A split without documents is an empty .bin and an .idx of no sequences, which Megatron cannot open: a
    blend leaves it out. With several `threads`, the next documents are read while others are encoded; the
    result is the same. Returns the record.
    """
    _check(settings)
    made = read_tokenizer(tokenizer)
    info = tokenizer_info(tokenizer, made)
    outputs = {
        f"{split}{path.suffix}": path for split in SPLITS for path in paths(bins[split].with_suffix(""))
    }
    outputs["documents"] = table
    with making("tokens", f"{settings.corpus}/{record.stem}", outputs=outputs, record=record) as job:
        encoder = Encoder(tokenizer, made=made)
        del made  # some 40 MB for 131,072 entries
        shard = _Shard(texts, settings, info, outputs, job.aside)
        try:
            shard.run(encoder, threads)
        except Mismatch as error:
            logger.warning("encoding all of this shard again with `tokenizers`, slower: fastokens: %s", error)
            shard = _Shard(texts, settings, info, outputs, job.aside)
            shard.run(Encoder(tokenizer, problem=str(error)), threads)
        identity = Entry("tokenizer", str(tokenizer / "tokenizer.json"), info.sha256)
        job.inputs = {"text": shard.reader.read.entries(), "tokenizer": identity}
        job.hashes = shard.hashes
        job.settings = {
            **settings.model_dump(mode="json"),
            "shard": record.stem,
            "tokenizer": info.sha256,
            "dtype": info.dtype,
            "end_of_document": info.eos_id,
        }
        job.counts = shard.counts()
    return job.record


def _check(settings: TokenizeSettings) -> None:
    valid, test = settings.valid_fraction, settings.test_fraction
    if min(valid, test) < 0 or valid + test >= 1:
        raise UserError(f"valid_fraction {valid} + test_fraction {test} leave nothing for train")
    if settings.max_document_tokens == 1:
        raise UserError("max_document_tokens 1 has room for the end of a document only; give at least 2")


# -------------------------------------------------------------------------------------------------- writing


class _Shard:
    """Encodes the documents of one shard and writes the files, under their temporary names."""

    def __init__(
        self,
        texts: Sequence[Path],
        settings: TokenizeSettings,
        info: Info,
        outputs: Mapping[str, Path],
        aside: Mapping[str, Path],
    ) -> None:
        self.settings = settings
        self.reader = Reader(texts, settings, room=settings.max_documents)
        self.hashes: dict[str, str] = {}  # sha256 of the .bin and .idx files, by the name of the output
        self._info = info
        self._dtype = np.dtype(info.dtype)
        self._outputs, self._aside = outputs, aside
        self._drops = Drops()  # dropped after reading; the reader runs ahead and counts its own
        self._kept = self._cut = 0
        self._full = False
        self._documents, self._tokens, self._bytes = (np.zeros(len(SPLITS), np.int64) for _ in range(3))
        self._histogram = np.zeros(64, np.int64)

    def run(self, encoder: Encoder, threads: int) -> None:
        """Write all files; raises `Mismatch` when fastokens gives one of the documents wrong ids."""
        limited = self.settings.max_documents is not None or self.settings.max_tokens is not None
        batches = self.reader.batches()
        with contextlib.ExitStack() as stack:
            self._open(stack)
            for batch in ahead(batches) if threads > 1 and not limited else batches:
                self._write(batch, *self._encode(encoder, batch))
                if self._full:
                    break
            self._check()
            self._close()
        self._encoder = encoder

    def _encode(self, encoder: Encoder, batch: list[Document]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a batch and their offsets; a document that cannot be encoded is dropped, or an error."""
        while True:
            try:
                return encoder.encode([document.text for document in batch])
            except Mismatch as error:
                document = batch[error.index]
                where = place(Path(document.file), document.row)
                raise Mismatch(error.index, f"{where}: {error}") from None
            except Unencodable as error:
                document = batch.pop(error.index)
                bad = Bad(str(error), "remove the row")
                reject(bad, Path(document.file), document.row, self.settings, self._drops)

    def _open(self, stack: contextlib.ExitStack) -> None:
        self._writers = []
        for split in SPLITS:
            pair = self._aside[f"{split}.bin"], self._aside[f"{split}.idx"]
            self._writers.append(binidx.Writer(*pair, self._dtype, self._outputs[f"{split}.bin"]))
            stack.callback(self._writers[-1].abandon)
        fields = self.settings.metadata_fields
        final = self._outputs["documents"]
        self._table = origins.Writer(self._aside["documents"], fields, final)
        stack.callback(self._table.abandon)
        self._sinks: Sequence[Any] = self._writers
        if self.settings.document_order == "shuffled":
            seed = self.settings.seed or 0
            self._sinks = [binidx.Shuffled(w, (seed, i)) for i, w in enumerate(self._writers)]
            self._waiting = tempfile.TemporaryFile(dir=final.parent)  # noqa: SIM115
            stack.callback(self._waiting.close)
            self._ordered = self._table
            self._table = origins.Writer(self._waiting, fields, final)
            stack.callback(self._table.abandon)

    def _write(self, batch: list[Document], ids: np.ndarray, starts: np.ndarray) -> None:
        """Write those documents of a batch that are kept."""
        lengths = np.diff(starts)  # tokens of each document, without its end
        room = (self.settings.max_document_tokens or 1 << 62) - 1
        pieces = -(-lengths // room)
        keep = self._choose(batch, lengths, pieces)
        if not keep.all():
            batch = [document for document, kept in zip(batch, keep, strict=True) if kept]
            ids = ids[np.repeat(keep, lengths)]
            lengths, pieces = lengths[keep], pieces[keep]
        if not batch:
            return
        self._kept += len(batch)
        self._cut += int(np.count_nonzero(pieces > 1))
        if self.reader.room is not None:
            self.reader.room -= len(batch)
        sequences = _cut(lengths, pieces, room)
        tokens = _with_ends(ids, sequences, self._info.eos_id, self._dtype)
        self._write_documents(batch, tokens, sequences + 1, lengths + pieces, pieces)

    def _choose(self, batch: list[Document], lengths: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        """A mask of the documents of a batch that are kept; the others are counted as dropped."""
        settings = self.settings
        keep = lengths > 0
        self._drop(batch, ~keep, NO_TOKENS, lengths)
        if settings.max_document_tokens and settings.long_documents == "drop":
            self._drop(batch, pieces > 1, TOO_LONG, lengths)
            keep &= pieces <= 1
        if settings.max_tokens is not None:
            total = self._tokens.sum() + np.cumsum(np.where(keep, lengths + pieces, 0))
            self._full = bool((total > settings.max_tokens).any())
            if self._full:
                after = keep & (total > settings.max_tokens)
                self._drops.reasons[AFTER_LIMIT] += int(np.count_nonzero(after))
                keep &= ~after
        return keep

    def _drop(self, batch: list[Document], which: np.ndarray, reason: str, lengths: np.ndarray) -> None:
        for index in np.flatnonzero(which):
            detail = f"{lengths[index] + 1} tokens" if reason == TOO_LONG else ""
            self._drops.add(batch[index].file, batch[index].row, reason, detail)

    def _write_documents(
        self,
        batch: list[Document],
        tokens: np.ndarray,
        lengths: np.ndarray,
        num_tokens: np.ndarray,
        pieces: np.ndarray,
    ) -> None:
        """Write `tokens`, which are sequences of `lengths`.

        Document i has pieces[i] of the sequences, and num_tokens[i] tokens in them.
        """
        splits = np.array([document.split for document in batch])
        of_sequences = np.repeat(splits, pieces)
        indices = np.empty(len(lengths), np.int64)
        for split, before in enumerate(self._documents):
            mine = np.flatnonzero(of_sequences == split)
            indices[mine] = before + np.arange(len(mine))
        alone = np.ones(len(batch) - 1, bool) if self._sinks is not self._writers else np.diff(splits) != 0
        ends = [*(np.flatnonzero(alone) + 1).tolist(), len(batch)]  # of each run of documents for one file
        token_ends, sequence_ends = np.cumsum(num_tokens), np.cumsum(pieces)
        token = sequence = 0
        for end in ends:
            to = self._sinks[splits[end - 1]]
            to.write(tokens[token : token_ends[end - 1]], lengths[sequence : sequence_ends[end - 1]])
            token, sequence = token_ends[end - 1], sequence_ends[end - 1]
        repeated = np.repeat(np.arange(len(batch)), pieces).tolist()
        self._table.write(
            origins.Sequences(
                splits=of_sequences,
                indices=indices,
                files=[batch[i].file for i in repeated],
                rows=np.array([batch[i].row for i in repeated]),
                tokens=lengths,
                metadata=[batch[i].metadata for i in repeated],
            )
        )
        num_bytes = np.array([_num_bytes(document.text) for document in batch])
        self._documents += np.bincount(of_sequences, minlength=len(SPLITS))
        for total, values in ((self._tokens, num_tokens), (self._bytes, num_bytes)):
            np.add.at(total, splits, values)
        self._histogram += np.bincount(np.frexp(lengths)[1] - 1, minlength=len(self._histogram))

    def _check(self) -> None:
        """`UserError` when too much was dropped.

        A shard of which nothing is left is told: the blend leaves it out, and refuses a corpus of no others.
        """
        settings, drops = self.settings, self._all_drops()
        where = ", ".join(map(str, self.reader.read))
        drops.check(settings)
        if self._kept and (said := drops.told(where)):
            logger.info("%s", said)
        if not self._kept:
            reasons = counted(dict(drops.reasons.most_common()), empty="it is empty", sign=" ")
            message = f"{where}: none of its {drops.num_rows} rows is used ({reasons})"
            if self._full and not (self.reader.curated or drops.reasons[FILTERED]):
                raise UserError(f"{message}; raise max_tokens")
            why = self.reader.drops.first_filtered
            logger.warning("%s", f"{message}: the first because {why}" if why else message)
        for name in settings.metadata_fields:
            if self._kept and name not in self.reader.found:
                logger.warning("%s: no row has the metadata field %r", where, name)

    def _close(self) -> None:
        if self._sinks is not self._writers:
            new = {split: sink.finish() for split, sink in enumerate(self._sinks)}
            self._table.close()
            origins.renumber(self._waiting, self._ordered, new)
            self._table = self._ordered
        self._table.close()
        for split, writer in zip(SPLITS, self._writers, strict=True):
            self.hashes[f"{split}.bin"], self.hashes[f"{split}.idx"] = writer.close()

    def _all_drops(self) -> Drops:
        """The drops of the reader and those after reading, together."""
        read, here = self.reader.drops, self._drops
        return Drops(read.reasons + here.reasons, read.listed + here.listed, read.num_rows, read.num_replaced)

    def counts(self) -> dict[str, Any]:
        """The counts for the record."""
        drops = self._all_drops()
        totals = zip(self._documents.tolist(), self._tokens.tolist(), self._bytes.tolist(), strict=True)
        names = ("documents", "tokens", "bytes")  # in the splits, a document is a sequence
        return {
            "documents": drops.num_rows,
            "kept": self._kept,
            "cut": self._cut,
            "replaced": drops.num_replaced,
            "bytes": int(self._bytes.sum()),
            "dropped": dict(drops.reasons.most_common()),
            "dropped_rows": drops.listed,
            "encoder": self._encoder.name,
            "checked": self._encoder.num_checked,
            "fallback": self._encoder.problem,  # why not by fastokens
            **{s: dict(zip(names, values, strict=True)) for s, values in zip(SPLITS, totals, strict=True)},
            "length_histogram": {str(1 << k): int(n) for k, n in enumerate(self._histogram) if n},
        }


def _cut(lengths: np.ndarray, pieces: np.ndarray, room: int) -> np.ndarray:
    """The lengths of the sequences: document i makes pieces[i], all of length `room` but its last."""
    if (pieces == 1).all():
        return lengths
    sequences = np.full(pieces.sum(), room)
    sequences[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * room
    return sequences


def _with_ends(ids: np.ndarray, lengths: np.ndarray, end: int, dtype: np.dtype) -> np.ndarray:
    """`ids` with `end` after each sequence."""
    result = np.empty(len(ids) + len(lengths), dtype)
    ends = np.cumsum(lengths + 1) - 1
    text = np.ones(len(result), bool)
    text[ends] = False
    result[text] = ids
    result[ends] = end
    return result


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())

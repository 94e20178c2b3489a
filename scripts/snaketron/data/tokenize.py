"""From one raw file to token ids: a datatrove pipeline in this process, which leaves no state of its own."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from snaketron import files, lineage
from snaketron.data import binidx
from snaketron.data import tokenizer as tokenizers
from snaketron.data.readers import StrictReader
from snaketron.data.split import SPLITS, split_of
from snaketron.log import UserError

from datatrove.data import Document, DocumentsPipeline
from datatrove.io import DataFolder
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from datatrove.utils.tokenization import PipelineStepWithTokenizer

logger = logging.getLogger(__name__)

# A batch ends at either: enough to keep the encoder's threads busy, and some 100 MB at most.
BATCH_DOCUMENTS = 1000
BATCH_CHARACTERS = 1_000_000


def tokenize_shard(
    text: Path,
    *,
    text_field: str,
    corpus: str,
    tokenizer: Path,
    valid_fraction: float,
    test_fraction: float,
    bins: dict[str, Path],
    record: Path,
) -> dict[str, Any]:
    """Tokenize the raw file `text` into a .bin/.idx pair a split, and write `record` last.

    `bins` maps each split to its .bin. A split without documents is an empty .bin and an .idx of no
    sequences, which Megatron cannot open: a blend leaves it out. Returns the record.
    """
    if min(valid_fraction, test_fraction) < 0 or valid_fraction + test_fraction >= 1:
        raise UserError(
            f"valid_fraction {valid_fraction} + test_fraction {test_fraction} leave nothing for train"
        )
    info = tokenizers.info(tokenizer)
    outputs = [path for split in SPLITS for path in binidx.paths(bins[split].with_suffix(""))]
    with files.writing(*outputs, record) as temporary:
        step = SplitTokenizer(tokenizer, info, bins, valid_fraction, test_fraction)
        run([StrictReader(text, text_field), step])
        counts = step.counts
        if not counts["documents"]:
            raise UserError(f"{text}: holds no documents; remove it from the corpus {corpus!r} or fill it")
        if not any(counts[split]["documents"] for split in SPLITS):
            raise UserError(f"{text}: the text of each of its {counts['documents']} documents is empty")
        value = lineage.record(
            "tokens",
            f"{corpus}/{record.stem}",
            inputs=[text, {"path": str(tokenizer / "tokenizer.json"), "sha256": info.sha256}],
            outputs=dict(zip(outputs, temporary, strict=False)),
            settings={
                "corpus": corpus,
                "shard": record.stem,
                "text_field": text_field,
                "valid_fraction": valid_fraction,
                "test_fraction": test_fraction,
                "tokenizer": info.sha256,
                "dtype": info.dtype,
                "end_of_document": info.eos_id,
            },
            counts=counts,
        )
        temporary[-1].write_bytes(files.to_json(value))
    return value


def run(pipeline: Iterable[Any]) -> None:
    """Run datatrove blocks as its executor does, but without its own markers of what is done."""
    data: DocumentsPipeline | None = None
    for block in pipeline:
        data = block(data)
    if data is not None:
        deque(data, maxlen=0)


class SplitTokenizer(PipelineStepWithTokenizer):
    """Tokenize documents and write each, with the end-of-document token, to the files of its split.

    The files are written under their temporary names (`files.partial`).
    """

    type = "🔢 - TOKENIZER"
    name = "✂️ Splits"

    def __init__(
        self,
        tokenizer: Path,
        info: tokenizers.Info,
        bins: dict[str, Path],
        valid_fraction: float,
        test_fraction: float,
    ) -> None:
        super().__init__(str(tokenizer / "tokenizer.json"), eos_token=info.eos_token)
        self.info = info
        self.bins = bins
        self.fractions = (valid_fraction, test_fraction)
        self.counts: dict[str, Any] = {"documents": 0, "bytes": 0, "dropped": {"empty": 0, "no_tokens": 0}}
        self.counts |= {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tokenizers.plain(self.tokenizer)
        itemsize = 2 if self.info.dtype == "uint16" else 4
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(_writer(path, itemsize)) for split, path in self.bins.items()
            }
            for batch in self._batches(data):
                encodings = self.tokenizer.encode_batch_fast([document.text for document in batch])
                for document, encoding in zip(batch, encodings, strict=True):
                    self._write(writers, document.text, encoding.ids)
        yield from ()

    def _batches(self, data: DocumentsPipeline) -> Iterator[list[Document]]:
        batch: list[Document] = []
        characters = 0
        for document in data:
            self.counts["documents"] += 1
            if not document.text:
                self.counts["dropped"]["empty"] += 1
                continue
            batch.append(document)
            characters += len(document.text)
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _write(self, writers: dict[str, MegatronTokenizedFile], text: str, ids: list[int]) -> None:
        num_bytes = len(text.encode())
        self.counts["bytes"] += num_bytes
        if len(ids) < 2:  # a normalizer left nothing before the end of the document
            self.counts["dropped"]["no_tokens"] += 1
            return
        split = split_of(text, *self.fractions)
        with _naming(self.bins[split]):
            writers[split].write(ids)
        count = self.counts[split]
        count["documents"] += 1
        count["tokens"] += len(ids)
        count["bytes"] += num_bytes


class _PartialFolder(DataFolder):
    """A folder whose files are opened under their temporary names."""

    def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        return super().open(files.partial(Path(path)).name, mode, *args, **kwargs)


@contextlib.contextmanager
def _writer(bin_path: Path, token_size: int) -> Iterator[MegatronTokenizedFile]:
    folder = _PartialFolder(str(bin_path.parent))
    writer = MegatronTokenizedFile(folder, bin_path.stem, token_size=token_size)
    try:
        yield writer
        with _naming(bin_path):
            writer.close()
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk: what is buffered cannot be written either
            writer.bin_file.close()
        raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in a failure to write: a full disk alone does not say which."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise

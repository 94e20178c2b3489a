"""datatrove's reader of documents, strict.

datatrove's JsonlReader and ParquetReader log a bad line, an unreadable rest of a file or a row without
text and go on; what is left looks like a complete shard. This reader stops with the place instead.
"""

from __future__ import annotations

from pathlib import Path

from snaketron.data.rows import read_texts

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers.base import BaseReader


class StrictReader(BaseReader):
    """Every row of one .jsonl[.gz|.zst] or .parquet file as a document; empty ones too."""

    name = "📏 Strict"

    def __init__(self, path: Path, text_key: str) -> None:
        super().__init__(text_key=text_key)
        self.path = path

    def run(
        self, data: DocumentsPipeline | None = None, rank: int = 0, world_size: int = 1
    ) -> DocumentsPipeline:
        for number, text in read_texts(self.path, self.text_key):
            yield Document(text=text, id=str(number))

"""Rendered chats: from rows of conversations to Parquet with ids, mask, source row and split."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from snaketron.data import chat
from snaketron.data.documents import text_of
from snaketron.data.packed import KEY, list_array, number_array, string_array
from snaketron.data.rows import FILTERED, Bad, Drops, place, read_rows, reject
from snaketron.data.split import SPLITS, split_of
from snaketron.log import UserError
from snaketron.settings import RenderSettings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import jinja2
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("split", pa.dictionary(pa.int8(), pa.string())),
    ]
)
BATCH_CHARACTERS = 1_000_000  # tokenized together
ROW_GROUP_TOKENS = 1 << 18


class Rendered(NamedTuple):
    file: Path
    row: int
    text: str
    spans: list[chat.Span]
    metadata: list[str | None]


class Conversation(NamedTuple):
    """A row of the output."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    file: str
    row: int
    split: str
    metadata: list[str | None]


@dataclass
class Renderer:
    """What turns the rows of one source into token ids."""

    template: jinja2.Template
    tokenizer: Tokenizer
    settings: RenderSettings
    read: list[Path] = field(default_factory=list)  # the files that were opened
    found: set[str] = field(default_factory=set)  # the metadata fields that a row had

    def write(self, path: Path, chats: Sequence[Path], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Write the conversations of the files `chats` to `path`; returns the counts for the record."""
        fields = self.settings.metadata_fields
        if taken := [name for name in fields if name in SCHEMA.names]:
            raise UserError(
                f"metadata_fields: {taken[0]!r} is a column of rendered chats itself; leave it out of "
                "metadata_fields, or rename it in the raw files"
            )
        schema = pa.schema([*SCHEMA, *((name, pa.string()) for name in fields)])
        schema = schema.with_metadata({KEY: json.dumps(metadata).encode()})
        texts = [name for name in schema.names if name not in ("input_ids", "loss_mask", "row")]
        options = {"compression": "zstd", "use_dictionary": texts, "write_statistics": False}
        drops = Drops()
        kept = {split: Counter(conversations=0, tokens=0, trained_tokens=0) for split in SPLITS}
        with pq.ParquetWriter(path, schema, **options) as writer:
            conversations = self.limited(self.encode(self.render(chats, drops), drops), drops)
            for group in batches(conversations, ROW_GROUP_TOKENS, lambda item: len(item.input_ids)):
                writer.write_table(_table(group, schema))
                for item in group:
                    trained = int(np.count_nonzero(item.loss_mask))
                    kept[item.split].update(
                        conversations=1, tokens=len(item.input_ids), trained_tokens=trained
                    )
        drops.check(self.settings)
        totals = {name: sum(counts[name] for counts in kept.values()) for name in kept["train"]}
        self.complain(drops, totals["conversations"])
        return {
            "rows": drops.num_rows,
            **totals,
            "splits": {split: dict(counts) for split, counts in kept.items()},
            "dropped": {reason: count for reason, count in drops.reasons.most_common() if count},
            "dropped_rows": drops.listed,
            "replaced": drops.num_replaced,
        }

    def complain(self, drops: Drops, num_kept: int) -> None:
        """`UserError` when no row can be used; a warning when no row is wanted."""
        names = ", ".join(map(str, self.read))
        if not num_kept and drops.num_rows:
            message = f"{names}: none of {drops.num_rows} rows can be used: {explain(drops)}"
            if drops.num_rows > drops.reasons[FILTERED]:
                raise UserError(message)
            logger.warning("%s", message)
        for name in self.settings.metadata_fields:
            if num_kept and name not in self.found:
                logger.warning("%s: no row has the metadata field %r", names, name)

    def render(self, chats: Sequence[Path], drops: Drops) -> Iterator[Rendered]:
        """The rows of all files as text, one after the other."""
        settings = self.settings
        control_tokens = chat.control_tokens(self.tokenizer)
        optional = [settings.tools_field, *settings.metadata_fields]
        for path in chats:
            self.read.append(path)
            required = [settings.messages_field]
            rows = read_rows(path, required=required, optional=optional, settings=settings, drops=drops)
            for number, row in rows:
                self.found.update(name for name in settings.metadata_fields if name in row)
                try:
                    check_field(row, settings.messages_field)
                    found = chat.conversation(row[settings.messages_field], row.get(settings.tools_field))
                    if control_tokens:
                        chat.check_control_tokens(found, control_tokens)
                    text, spans = chat.render(self.template, found.messages, found.tools)
                except chat.Unusable as error:
                    drops.add(path, number, error.reason, error.detail)
                except Bad as bad:
                    reject(bad, path, number, settings, drops)
                else:
                    metadata = [text_of(row.get(name)) for name in settings.metadata_fields]
                    yield Rendered(path, number, text, spans, metadata)

    def encode(self, rendered: Iterable[Rendered], drops: Drops) -> Iterator[Conversation]:
        """Conversations with something to train on; where they are limited, none is read ahead."""
        settings = self.settings
        limited = settings.max_documents is not None or settings.max_tokens is not None
        at_once = 1 if limited else BATCH_CHARACTERS
        for batch in batches(rendered, at_once, lambda item: len(item.text)):
            encodings = self.tokenizer.encode_batch([item.text for item in batch], add_special_tokens=False)
            for source, encoding in zip(batch, encodings, strict=True):
                input_ids, loss_mask = chat.masked(encoding, source.spans)
                if not loss_mask.any():
                    drops.add(source.file, source.row, "nothing to train on")
                    continue
                split = split_of(source.text, settings.valid_fraction, settings.test_fraction)
                yield Conversation(input_ids, loss_mask, str(source.file), source.row, split, source.metadata)

    def limited(self, conversations: Iterable[Conversation], drops: Drops) -> Iterator[Conversation]:
        """The first conversations, exactly as many as the limits of the settings allow."""
        settings, tokens = self.settings, 0
        for count, conversation in enumerate(conversations, 1):
            tokens += len(conversation.input_ids)
            if settings.max_tokens is not None and tokens > settings.max_tokens:
                drops.num_rows -= 1  # this one is not of the sample
                if count == 1:
                    raise UserError(
                        f"{place(Path(conversation.file), conversation.row)}: the first conversation has "
                        f"{tokens} tokens, more than max_tokens {settings.max_tokens} of source "
                        f"{settings.source!r}; raise it"
                    )
                return
            yield conversation
            if count == settings.max_documents:
                return


def _table(chats: Sequence[Conversation], schema: pa.Schema) -> pa.Table:
    splits = np.array([SPLITS.index(item.split) for item in chats])
    columns = [
        list_array([item.input_ids for item in chats], pa.int32()),
        list_array([item.loss_mask for item in chats], pa.uint8()),
        string_array([item.file for item in chats]),
        number_array(np.array([item.row for item in chats]), pa.int64()),
        pa.DictionaryArray.from_arrays(number_array(splits, pa.int8()), string_array(SPLITS)),
        *(string_array(texts) for texts in zip(*(item.metadata for item in chats), strict=True)),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def check_field(row: Mapping[str, Any], messages_field: str) -> None:
    """`Bad` when the field for the messages is something else: mostly a wrong setting."""
    messages = row[messages_field]
    if messages is None or isinstance(messages, list):
        return
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        return  # JSON text
    fields = ", ".join(repr(name) for name in row)
    raise Bad(
        f"field {messages_field!r} holds a {type(messages).__name__}, not a list of messages; "
        f"the fields are {fields}",
        "set messages_field of this source to the right one",
    )


def batches[Item](items: Iterable[Item], most: int, size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Items in their order, a list whenever their sizes have reached `most` together."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= most:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def explain(drops: Drops) -> str:
    """Reasons and numbers in one line, with an example of the first."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in drops.reasons.most_common() if count)
    if not drops.listed:
        return reasons
    first = drops.listed[0]
    return f"{reasons}; {place(Path(first['file']), first['row'])}: {first['detail'] or first['reason']}"

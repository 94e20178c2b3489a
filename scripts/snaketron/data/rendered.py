"""Rendered chats: from rows of conversations to Parquet with ids, mask, source row and split."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from snaketron.data import chat
from snaketron.data.packed import KEY, list_array, number_array
from snaketron.data.rows import place
from snaketron.data.split import SPLITS, split_of
from snaketron.log import UserError

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
        ("row", pa.int64()),
        ("split", pa.dictionary(pa.int8(), pa.string())),
    ]
)
BATCH_CHARACTERS = 1_000_000  # tokenized together, and one row group
MAX_LISTED = 100  # dropped rows that the record names
MAX_DETAIL = 200  # characters


class Rendered(NamedTuple):
    row: int
    text: str
    spans: list[chat.Span]


@dataclass
class Drops:
    """Rows that are not used: how many for each reason, and which."""

    reasons: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: int, reason: str, detail: str = "") -> None:
        self.reasons[reason] += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append({"row": row, "reason": reason, "detail": detail[:MAX_DETAIL]})


@dataclass
class Renderer:
    """What turns a row of one source into token ids."""

    template: jinja2.Template
    tokenizer: Tokenizer
    messages_field: str
    tools_field: str
    valid_fraction: float
    test_fraction: float

    def write(
        self, path: Path, rows: Iterable[tuple[int, dict[str, Any]]], chats: Path, metadata: Any
    ) -> Any:
        """Write the conversations of `rows` to `path`; returns the counts for the record.

        `rows` are numbered rows of the file `chats`, which errors name.
        """
        drops, num_rows = Drops(), 0

        def counted() -> Iterator[tuple[int, dict[str, Any]]]:
            nonlocal num_rows
            for number, row in rows:
                num_rows += 1
                yield number, row

        kept = {split: Counter(conversations=0, tokens=0, trained_tokens=0) for split in SPLITS}
        schema = SCHEMA.with_metadata({KEY: json.dumps(metadata).encode()})
        with pq.ParquetWriter(path, schema, compression="zstd", write_statistics=False) as writer:
            for batch in batches(self.render(counted(), chats, drops)):
                if table := self.tokenize(batch, drops, kept):
                    writer.write_table(table.cast(schema))
        if num_rows and not sum(counts["conversations"] for counts in kept.values()):
            raise UserError(f"{chats}: none of {num_rows} rows can be used: {explain(drops)}")
        return {
            "rows": num_rows,
            **{name: sum(counts[name] for counts in kept.values()) for name in kept["train"]},
            "splits": {split: dict(counts) for split, counts in kept.items()},
            "dropped": dict(drops.reasons.most_common()),
            "dropped_rows": drops.listed,
        }

    def render(
        self, rows: Iterable[tuple[int, dict[str, Any]]], chats: Path, drops: Drops
    ) -> Iterator[Rendered]:
        control_tokens = chat.control_tokens(self.tokenizer)
        for number, row in rows:
            check_field(row, self.messages_field, place(chats, number))
            try:
                conversation = chat.conversation(row[self.messages_field], row.get(self.tools_field))
                if control_tokens:
                    chat.check_control_tokens(conversation, control_tokens)
                yield Rendered(number, *chat.render(self.template, conversation.messages, conversation.tools))
            except chat.Unusable as error:
                drops.add(number, error.reason, error.detail)

    def tokenize(
        self, batch: list[Rendered], drops: Drops, kept: Mapping[str, Counter[str]]
    ) -> pa.Table | None:
        encodings = self.tokenizer.encode_batch([chat.text for chat in batch], add_special_tokens=False)
        columns: list[list[Any]] = [[], [], [], []]
        for rendered, encoding in zip(batch, encodings, strict=True):
            input_ids, loss_mask = chat.masked(encoding, rendered.spans)
            if not loss_mask.any():
                drops.add(rendered.row, "nothing to train on")
                continue
            split = split_of(rendered.text, self.valid_fraction, self.test_fraction)
            kept[split].update(
                conversations=1, tokens=len(input_ids), trained_tokens=int(np.count_nonzero(loss_mask))
            )
            for column, value in zip(columns, (input_ids, loss_mask, rendered.row, split), strict=True):
                column.append(value)
        if not columns[0]:
            return None
        ends = np.cumsum([0, *map(len, SPLITS)], dtype=np.int32)
        names = pa.StringArray.from_buffers(
            len(SPLITS), pa.py_buffer(ends), pa.py_buffer("".join(SPLITS).encode())
        )
        splits = number_array(np.array([SPLITS.index(split) for split in columns[3]]), pa.int8())
        arrays = [
            list_array(columns[0], pa.int32()),
            list_array(columns[1], pa.uint8()),
            number_array(np.array(columns[2]), pa.int64()),
            pa.DictionaryArray.from_arrays(splits, names),
        ]
        return pa.Table.from_arrays(arrays, schema=SCHEMA)


def check_field(row: Mapping[str, Any], messages_field: str, where: str) -> None:
    """`UserError` when the field for the messages is not there or is something else: a wrong setting."""
    messages = row[messages_field]
    if messages is None or isinstance(messages, list):
        return
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        return  # JSON text
    fields = ", ".join(repr(name) for name in row)
    raise UserError(
        f"{where}: field {messages_field!r} holds a {type(messages).__name__}, not a list of messages; "
        f"the fields are {fields}; set messages_field of this source to the right one"
    )


def batches(rendered: Iterable[Rendered], max_characters: int = BATCH_CHARACTERS) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    num_characters = 0
    for item in rendered:
        batch.append(item)
        num_characters += len(item.text)
        if num_characters >= max_characters:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def explain(drops: Drops) -> str:
    """Reasons and numbers in one line, with an example of the most frequent."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in drops.reasons.most_common())
    if not drops.listed:
        return reasons
    first = drops.listed[0]
    return f"{reasons}; row {first['row']}: {first['detail'] or first['reason']}"

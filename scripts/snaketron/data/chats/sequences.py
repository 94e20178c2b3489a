"""Rendered chats on disk: Parquet, a row a sequence of token ids with its mask and where it comes from.

A sequence is a whole conversation (`turn` 0), or what inference sees of it up to the answers to the user's
k-th turn (`turn` k). All sequences of a conversation follow each other and share a split.
"""

from __future__ import annotations

from typing import NamedTuple

from snaketron.config.data import SPLITS
from snaketron.data.arrow import list_array, number_array, string_array
from snaketron.data.chats import reasoning

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("turn", pa.int32()),
        ("split", pa.dictionary(pa.int8(), pa.string())),
        ("reasoning_mode", pa.dictionary(pa.int8(), pa.string())),
    ]
)


class Sequence(NamedTuple):
    """A row of a file of rendered chats."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    file: str
    row: int
    turn: int
    split: str
    mode: str
    metadata: list[str | None]


def num_tokens(conversation: list[Sequence]) -> int:
    return sum(len(item.input_ids) for item in conversation)


def table(chats: list[Sequence], schema: pa.Schema) -> pa.Table:
    """Sequences as rows; `schema` is SCHEMA with a column of text for each metadata field."""
    columns = [
        list_array([item.input_ids for item in chats], pa.int32()),
        list_array([item.loss_mask for item in chats], pa.uint8()),
        string_array([item.file for item in chats]),
        number_array(np.array([item.row for item in chats]), pa.int64()),
        number_array(np.array([item.turn for item in chats]), pa.int32()),
        _names([item.split for item in chats], SPLITS),
        _names([item.mode for item in chats], reasoning.MODES),
        *(string_array(texts) for texts in zip(*(item.metadata for item in chats), strict=True)),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _names(values: list[str], known: tuple[str, ...]) -> pa.DictionaryArray:
    indices = np.array([known.index(value) for value in values])
    return pa.DictionaryArray.from_arrays(number_array(indices, pa.int8()), string_array(known))

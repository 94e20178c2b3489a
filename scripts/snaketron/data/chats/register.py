"""Packs that were made elsewhere: verified, and written again as rule pack_sft writes them.

Other programs write row groups of tens of megabytes. A trainer would decode one for each pack that it reads
at random. And no footer says what the packs were made for.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from snaketron.config.data import SPLITS
from snaketron.data.arrow import flatten
from snaketron.data.chats import packs
from snaketron.data.chats.pack import length_histogram
from snaketron.data.tokenizer import Info, known_hashes, tokenizer_info
from snaketron.lineage.record import Entry, Record, making, of_user
from snaketron.log import UserError
from snaketron.settings.registering import PACKS, RegisterPacksSettings
from snaketron.sources import registered
from snaketron.wording import plural

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_SHOWN = 10  # faults


def register_packs(
    file: Path,
    *,
    settings: RegisterPacksSettings,
    tokenizer: Path,
    outputs: Mapping[str, Path],
    record: Path,
) -> Record:
    """Verify a file of packs, write it to the output of its split, empty files to the others, and `record`.

    Raises `UserError` with everything that the footer shows, or else with the first faults of its rows.
    """
    info = tokenizer_info(tokenizer)
    with making(PACKS, f"{settings.source}/{record.stem}", outputs=outputs, record=record) as job:
        said, problems = _footer(file, settings, tokenizer, info)
        given = of_user(file)
        counts = {} if problems else _verify(file, settings, info.vocab_size, problems)
        if problems:
            raise UserError("\n".join([f"{file} cannot be registered:", *problems]))
        job.inputs = {
            "packs": given,
            "tokenizer": Entry("tokenizer", str(tokenizer / "tokenizer.json"), info.sha256),
        }
        job.settings = {
            "source": settings.source,
            "tokenizer_sha256": info.sha256,
            "tokenizer_known": bool(settings.tokenizer_sha256 or said.get("tokenizer_sha256")),
            "template_sha256": said.get("template_sha256", ""),  # "": nothing says it
            "pack_size": settings.pack_size,
            "algorithm": said.get("algorithm", "registered"),
            "padding_multiple": settings.padding_multiple,
        }
        of_splits = {split: counts if split == settings.split else _count([], settings) for split in SPLITS}
        for split, path in job.aside.items():
            rows = read(file) if split == settings.split else iter(())
            footer = {**job.settings, "split": split, "counts": of_splits[split]}
            packs.write(path, rows, footer)
        job.counts = {"splits": of_splits}
    return job.record


def _footer(
    file: Path, settings: RegisterPacksSettings, tokenizer: Path, info: Info
) -> tuple[dict[str, Any], list[str]]:
    """What the footer of a file says, and in what the file is not what this workflow wants."""
    said, known = registered.footer(file), known_hashes(tokenizer)
    wanted = settings.model_dump(include={"split", "pack_size"})
    if said.get("tokenizer_sha256") not in known:
        wanted["tokenizer_sha256"] = info.sha256
    return said, [
        *registered.other(file, said, wanted),
        *settings.tokenizer_differences(tokenizer, known),
    ]


def read(path: Path) -> Iterator[packs.Pack]:
    """The packs of a file of any program, in the types of our own. Raises `UserError` where it is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=packs.SCHEMA.names, use_threads=False)
                table = table.select(packs.SCHEMA.names).cast(packs.SCHEMA)
                for column in table.columns:
                    if column.null_count or any(chunk.flatten().null_count for chunk in column.chunks):
                        raise ValueError("null in place of a number")
                columns = [flatten(column) for column in table.columns]
                for row in range(table.num_rows):
                    yield packs.Pack(
                        *(values[offsets[row] : offsets[row + 1]] for values, offsets in columns)
                    )
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: cannot be read, or holds other numbers than packs do ({error})") from None


def _verify(
    file: Path, settings: RegisterPacksSettings, vocab_size: int, problems: list[str]
) -> dict[str, Any]:
    """The counts of a file; adds what is wrong with it to `problems`."""
    faults = 0

    def sound() -> Iterator[packs.Pack]:
        nonlocal faults
        for row, pack in enumerate(read(file)):
            if found := fault(pack, settings, vocab_size):
                faults += 1
                if faults <= _SHOWN:
                    problems.append(f"row {row}: {found}")
            else:
                yield pack

    counts = _count(sound(), settings)
    if faults > _SHOWN:
        problems.append(f"and {faults - _SHOWN} more rows")
    if not faults and counts["packs"] and not counts["trained_tokens"]:
        problems.append(
            f"none of the tokens in its {plural(counts['packs'], 'pack')} is trained (loss_mask is 0)"
        )
    return counts


def fault(pack: packs.Pack, settings: RegisterPacksSettings, vocab_size: int) -> str | None:
    """Why a pack cannot be trained on; None for one that can."""
    ids, mask, starts = pack
    size, multiple = settings.pack_size, settings.padding_multiple
    if not len(ids) or len(ids) != len(mask):
        return f"{len(ids)} ids and a mask of {len(mask)}"
    if not len(starts) or starts[0] or (np.diff(starts) <= 0).any() or starts[-1] >= len(ids):
        return f"seq_start_id must rise from 0 and stay below {len(ids)} tokens, and is {starts[:8].tolist()}"
    if len(ids) > size:
        return f"{len(ids)} tokens, where a pack has at most sft_data.pack_size {size}"
    if (padded := int((-(-pack.lengths // multiple) * multiple).sum())) > size:
        return f"{padded} tokens once each conversation is padded to {multiple}, where a pack has {size}"
    if ids.min() < 0 or ids.max() >= vocab_size:
        bad = ids.max() if ids.max() >= vocab_size else ids.min()
        return f"id {bad}, where the vocabulary has 0 to {vocab_size - 1}"
    if mask.max() > 1:
        return f"loss_mask holds {mask.max()}, where it has 0 and 1"
    if mask[np.append(starts[1:], len(mask)) - 1].any():
        return "the last token of a conversation is trained, though its label is in another conversation"
    return None


def _count(found: Iterator[packs.Pack] | list[packs.Pack], settings: RegisterPacksSettings) -> dict[str, Any]:
    """What the record of a packed shard counts, of one split."""
    counts, lengths = Counter[str](), Counter[str]()
    for chunk in itertools.batched(found, 1000):
        of_conversations = np.concatenate([pack.lengths for pack in chunk])
        lengths.update(length_histogram(of_conversations))
        counts["packs"] += len(chunk)
        counts["packed"] += len(of_conversations)
        counts["tokens"] += int(of_conversations.sum())
        counts["trained_tokens"] += sum(int(pack.loss_mask.sum()) for pack in chunk)
    room = counts["packs"] * settings.pack_size
    return {
        "conversations": counts["packed"],
        "packed": counts["packed"],
        "dropped": {},
        "cut": 0,
        "cut_tokens": 0,
        "packs": counts["packs"],
        "tokens": counts["tokens"],
        "trained_tokens": counts["trained_tokens"],
        "efficiency": round(counts["tokens"] / room, 4) if room else 0.0,
        "length_histogram": dict(sorted(lengths.items(), key=lambda item: int(item[0]))),
    }

"""Tokens and packs that were made elsewhere: which files there are, and what their headers say.

Whoever registers them reads them whole (`data/text/register.py`, `data/chats/register.py`). This module reads
headers and footers alone, so that a dry-run lists all differences at once.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from snaketron.config import ChatSource, Config, ConfigError, Corpus
from snaketron.config.data import SPLITS
from snaketron.lineage.record import FOOTER
from snaketron.sources import pairs
from snaketron.sources.local import matches

COLUMNS = ("input_ids", "loss_mask", "seq_start_id")


def listed(source: Corpus | ChatSource, where: str) -> Iterator[tuple[str, str, str]]:
    """The split, the key and the path of each prefix or file that a source names, globs resolved.

    A glob without a match gives nothing; `check` says so.
    """
    suffix = ".bin" if isinstance(source, Corpus) else ""
    for split in SPLITS:
        for i, given in enumerate(getattr(source.registered, split)):
            pattern, at = given.removesuffix(suffix), f"{where}.{source.made}.{split}[{i}]"
            found = [pattern]
            if glob.has_magic(pattern) and not Path(pattern + suffix).exists():
                matched = matches(Path(pattern + suffix), at)
                # A hidden file belongs to a program that still writes it.
                found = sorted({str(p).removesuffix(suffix) for p in matched if not p.name.startswith(".")})
            yield from ((split, at, path) for path in found)


def files(source: Corpus | ChatSource, path: str) -> list[str]:
    """The files of a prefix of tokens, or of a path of packs."""
    return [str(p) for p in pairs.paths(Path(path))] if isinstance(source, Corpus) else [path]


def check(config: Config) -> None:
    """`ConfigError` with everything that is wrong with registered data, by path and key."""
    problems = [
        *(p for i, c in enumerate(config.corpora) if c.tokens for p in _tokens(config, c, f"corpora[{i}]")),
        *(p for i, c in enumerate(config.chats) if c.packs for p in _packs(config, c, f"chats[{i}]")),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _unlisted(source: Corpus | ChatSource, where: str) -> Iterator[str]:
    """The globs that match nothing, and what is named twice."""
    found = {at for _, at, _ in listed(source, where)}
    for split in SPLITS:
        for i, given in enumerate(getattr(source.registered, split)):
            if (at := f"{where}.{source.made}.{split}[{i}]") not in found:
                yield f"{at}: no {'pair' if source.made == 'tokens' else 'file'} matches {given}"
    first: dict[str, str] = {}
    for _, at, path in listed(source, where):
        other = first.setdefault(os.path.realpath(files(source, path)[0]), at)
        if other != at:
            yield f"{at}: {path} is named by {other} too; name it once"


def _tokens(config: Config, corpus: Corpus, where: str) -> Iterator[str]:
    assert corpus.tokens is not None
    if config.tokenizer.path is None and corpus.tokens.tokenizer_sha256 is None:
        yield f"{where}.tokens.tokenizer_sha256: {_UNKNOWN}"
    yield from _unlisted(corpus, where)
    # A tokenizer of elsewhere may have another size than the configuration says; whoever registers reads it.
    dtype = pairs.dtype_of(config.tokenizer.vocab_size) if config.tokenizer.path is None else None
    for _, at, prefix in listed(corpus, where):
        yield from (f"{at}: {problem}" for problem in pairs.differences(Path(prefix), dtype))


_UNKNOWN = (
    "nothing says which tokenizer made them, and this configuration trains its own (tokenizer.path: null); "
    "set tokenizer.path to the tokenizer that made them, or give the hash of its tokenizer.json"
)


def _packs(config: Config, source: ChatSource, where: str) -> Iterator[str]:
    assert source.packs is not None
    yield from _unlisted(source, where)
    for split, at, path in listed(source, where):
        try:
            metadata = footer(Path(path))
        except ConfigError as error:
            yield f"{at}: {error}"
            continue
        wanted = {
            "split": split,
            "pack_size": config.sft_data.pack_size,
            "tokenizer_sha256": source.packs.tokenizer_sha256,
        }
        yield from (f"{at}: {problem}" for problem in other(Path(path), metadata, wanted))
        known = metadata.get("tokenizer_sha256") or source.packs.tokenizer_sha256
        if config.tokenizer.path is None and not known:
            yield f"{at}: {path}: {_UNKNOWN}"


def other(path: Path, metadata: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """What the footer of packs says that is not as wanted; what it does not say, and None, is passed over."""
    keys = {"split": "name them there", "pack_size": "set sft_data.pack_size to it, or pack them again"}
    for name, value in wanted.items():
        said = metadata.get(name)
        if said is not None and value is not None and said != value:
            advice = keys.get(name, "pack them again, or take the tokenizer that they were made with")
            yield f"{path}: was made with {name} {said}, where {value} is wanted; {advice}"


def footer(path: Path) -> dict[str, Any]:
    """What this workflow wrote into the footer of a file of packs; nothing where another program wrote it.

    Raises `ConfigError` for a file that is missing, damaged or without the columns of packs.
    """
    import pyarrow as pa  # 0.1 s, which only a configuration with registered packs pays
    import pyarrow.parquet as pq

    try:
        found = pq.read_metadata(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{path}: damaged or not Parquet ({error})") from None
    schema = found.schema.to_arrow_schema()
    if missing := [name for name in COLUMNS if name not in schema.names]:
        raise ConfigError(f"{path}: has no column {', '.join(missing)}; packs have {', '.join(COLUMNS)}")
    for name in COLUMNS:
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not (
            pa.types.is_integer(kind.value_type)
            or (name == "loss_mask" and pa.types.is_boolean(kind.value_type))
        ):
            raise ConfigError(f"{path}: column {name} is {kind}, where packs have lists of integers")
    return dict(json.loads((found.metadata or {}).get(FOOTER, b"{}")))

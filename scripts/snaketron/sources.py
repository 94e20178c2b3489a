"""Which raw files there are: files, directories and globs of the configuration, listed from disk."""

from __future__ import annotations

import re
from pathlib import Path

from snaketron.config import ChatSource, ConfigError, Corpus

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
SAMPLE = re.compile(r"data/sample/([a-z0-9_]+)/part_\d+\.jsonl")


def shards(source: Corpus | ChatSource, where: str) -> dict[str, str]:
    """Map each shard's name to its raw file; a file's name without suffix and path is the shard's name.

    A file of the sample may not exist yet; anything else must. Raises `ConfigError`.
    """
    found: dict[str, str] = {}
    for i, pattern in enumerate(source.paths):
        at = f"{where}.paths[{i}]"
        for path in _files(pattern, at):
            suffix = max((s for s in SUFFIXES if path.endswith(s)), key=len, default="")
            if not suffix:
                raise ConfigError(f"{at}: {path} is none of {', '.join(SUFFIXES)}")
            name = re.sub(r"[^a-z0-9_.]", "_", Path(path).name.removesuffix(suffix).lower())
            if not name:
                raise ConfigError(f"{at}: {path} has no name before {suffix}; rename it")
            if found.setdefault(name, path) != path:
                raise ConfigError(f"{at}: {path} and {found[name]} would both be shard {name!r}; rename one")
    return dict(sorted(found.items()))


def _files(pattern: str, at: str) -> list[str]:
    if SAMPLE.fullmatch(pattern):
        return [pattern]
    path = Path(pattern)
    if path.is_dir():
        listed = (p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        # Hidden files belong to the program that is still downloading or editing.
        files = sorted(str(p) for p in listed if not any(map(_hidden, p.relative_to(path).parts)))
        return files or _missing(f"{at}: no {', '.join(SUFFIXES)} file in the directory {pattern}")
    if path.is_file():
        return [str(path)]
    if not any(c in pattern for c in "*?["):
        return _missing(f"{at}: {pattern} does not exist (relative paths start at {Path.cwd()})")
    root = Path(path.anchor)
    matched = (p for p in root.glob(str(path.relative_to(root))) if p.is_file())
    files = sorted(str(p) for p in matched if not _hidden(p.name) or _hidden(path.name))
    return files or _missing(f"{at}: no file matches {pattern}")


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _missing(message: str) -> list[str]:
    raise ConfigError(message)

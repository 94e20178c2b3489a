"""The files of a published checkpoint and the tensors that each holds, by name alone.

A dry-run asks this, without torch.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snaketron.sources.formats import FETCH, IS_POINTER, is_pointer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"  # the only file of a small model, which then has no index
LARGEST_HEAD = 100_000_000  # bytes, of a file of safetensors


def read_index(directory: Path) -> tuple[dict[str, str], list[str]]:
    """The file of each tensor, empty for a single file; and what is wrong with the index."""
    path = directory / INDEX
    if not path.exists():
        return {}, [] if (directory / SINGLE).exists() else [f"neither {INDEX} nor {SINGLE} is there"]
    try:
        found = dict(json.loads(path.read_bytes())["weight_map"])
        if wrong := [name for name, file in found.items() if not isinstance(file, str)]:
            raise TypeError(f"the file of {wrong[0]} is no name")
        if not found:
            raise ValueError("it lists no tensors")
    except (ValueError, KeyError, TypeError, OSError) as error:
        return {}, [f"{INDEX}: not an index of safetensors ({type(error).__name__}: {error})"]
    # A file elsewhere would be no input of the job, and a change of it would make nothing again.
    elsewhere = sorted({file for file in found.values() if "/" in file or not file.endswith(".safetensors")})
    problems = [f"{INDEX}: names {file!r}; only NAME.safetensors beside it is read" for file in elsewhere]
    return {name: file for name, file in found.items() if file not in elsewhere}, problems


def missing_files(directory: Path, index: Mapping[str, str]) -> list[str]:
    """A line for each file that an index names and that is not there."""
    files = sorted(Counter(index.values()).items())
    return [f"{name}: missing, with {n} tensors" for name, n in files if not (directory / name).exists()]


def cut_files(directory: Path) -> list[str]:
    """A line for each file of weights that is not whole, by its size and its head: no tensor is read."""
    problems = []
    for path in sorted(directory.glob("*.safetensors")):
        if not path.exists():  # a link to nothing, which is missing
            continue
        size = path.stat().st_size
        try:
            start, head = _head(path)
            end = start + max((part["data_offsets"][1] for part in head.values()), default=0)
            why = f"{size} bytes, where its head promises {end}" if size < end else ""
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            why = f"{IS_POINTER}; {FETCH}" if is_pointer(path) else f"damaged ({size} bytes); copy it again"
        problems += [f"{path.name}: {why}"] if why else []
    return problems


def tensor_names(directory: Path) -> set[str]:
    """The tensors of a checkpoint, by its index or the head of its only file; none where that is damaged."""
    index, _ = read_index(directory)
    if index:
        return set(index)
    with contextlib.suppress(OSError, ValueError, TypeError):
        return set(_head(directory / SINGLE)[1])
    return set()


def _head(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file begin, and what its head says of each."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(min(length, LARGEST_HEAD)))
    head.pop("__metadata__", None)
    return 8 + length, head

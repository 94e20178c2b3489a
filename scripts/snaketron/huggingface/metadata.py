"""The tensors that a checkpoint of Megatron lists, read without torch and without running what it names.

`.metadata` is a pickle of torch's classes. A dry-run reads their names and shapes alone. An import looks here
before torch reads it, which would call whatever a file from elsewhere names.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from snaketron.huggingface.names import VOCABULARY, Megatron
from snaketron.log import UserError

type Listed = Mapping[str, tuple[tuple[int, ...], str]]  # shape, and the type as torch writes it


class _Object:
    """Stands for an object of any class of the pickle."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


# What such lists are made of: torch's descriptions of tensors and files, types, the path of the directory.
_KNOWN = re.compile(
    r"torch\.distributed\.(checkpoint\.metadata|_shard\.sharded_tensor\.metadata)\.\w+"
    r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|torch\.(Size|bool|[a-z]+\d\w*)|torch\.serialization\._get_layout"
    r"|pathlib(\._local)?\.\w*Path|collections\.OrderedDict"
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not _KNOWN.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is none of its parts")
        return type(name, (_Object,), {"__module__": module})


def listed_tensors(directory: Path) -> Listed:
    """Shape and type of each tensor but the optimizer's; `UserError` where they cannot be read."""
    with _metadata(directory) as found:
        return {
            key: (tuple(value.size.arguments[0]), f"torch.{value.properties.state[0].__name__}")
            for key, value in found.state_dict_metadata.items()
            if type(value).__name__ == "TensorStorageMetadata" and not key.startswith("optimizer.")
        }


def damaged_files(directory: Path) -> list[str]:
    """The files that are missing, or shorter than the list of the tensors says; a line each, unread."""
    ends: dict[str, int] = {}
    with _metadata(directory) as found:
        for part in found.storage_data.values():
            name = part.relative_path
            ends[name] = max(ends.get(name, 0), part.offset + part.length)
    problems = []
    for name, end in sorted(ends.items()):
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: no such file; name a directory of one iteration that holds it")
        elif (size := path.stat().st_size) < end:
            problems.append(f"{path}: {size} bytes, where .metadata promises {end}")
    return problems


@contextlib.contextmanager
def _metadata(directory: Path) -> Iterator[Any]:
    """What .metadata lists; `UserError` where it cannot be read, or lacks what is asked of it."""
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            yield _Unpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a directory of one iteration that holds it") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not the list of a torch_dist checkpoint, or damaged ({error}); copy it again"
        ) from None


def megatron_differences(found: Listed, wanted: Iterable[Megatron], vocab_size: int | None) -> list[str]:
    """Everything in which the tensors of a checkpoint are not those of a model, a line each.

    `vocab_size` counts the tokenizer's tokens, where it is known: each needs a row.
    """
    shapes: Mapping[str, tuple[int, ...]] = {tensor.key: tensor.shape for tensor in wanted}
    problems = []
    for key, shape in shapes.items():
        if key not in found:
            problems.append(f"{key}: missing")
            continue
        there, dtype = found[key]
        fits = there == shape
        if key in VOCABULARY:
            fits = there[1:] == shape[1:] and (vocab_size is None or there[0] >= vocab_size)
        if not fits:
            problems.append(f"{key}: {list(there)}, and the model wants {list(shape)}")
        if dtype not in ("torch.float32", "torch.bfloat16"):
            problems.append(f"{key}: of type {dtype}; only float32 and bfloat16 are read")
    return problems + [f"{key}: not of this model" for key in found if key not in shapes]

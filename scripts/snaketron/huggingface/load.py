"""Read a checkpoint that was made elsewhere: published tensors, or those of Megatron without a record.

Both give the tensors of a checkpoint of Megatron one by one, to be written as one that trainings read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from snaketron.config import Model
from snaketron.huggingface import config
from snaketron.huggingface.index import INDEX
from snaketron.huggingface.metadata import damaged_files, megatron_differences
from snaketron.huggingface.names import VOCABULARY, Megatron, Source, megatron_tensors, tensors
from snaketron.huggingface.save import listed
from snaketron.huggingface.shards import DTYPES, Shards
from snaketron.huggingface.torch_dist import Chunk, LastRead, Reader, is_finite
from snaketron.log import UserError
from snaketron.sizes.parameters import padded_vocab_size

import torch


class Weights(NamedTuple):
    """A checkpoint whose names, shapes and types were found to be those of a model."""

    chunks: list[Chunk]
    files: list[Path]  # that it is read from
    precision: str  # of the model: fp32 or bf16
    not_finite: list[str]  # names of tensors, filled while they are made
    unread: str = ""  # a sentence about keys of its configuration
    stated_length: int = 0  # tokens of a sequence that its configuration speaks of; 0: of none
    ends: Sequence[int] = ()  # ids at which its answers end
    stated_deviation: float = 0.0  # of the first weights; 0: its configuration speaks of none


def published_weights(directory: Path, model: Model, vocab_size: int) -> Weights:
    """The tensors of a published checkpoint as Megatron has them; only headers are read here.

    Rows of the vocabulary beyond the tokenizer's with their padding are left out; those that only Megatron
    has are zero.

    Raises:
        UserError: it is of another model, incomplete or damaged; all differences at once.
    """
    values = config.read_config(directory)
    problems = config.differences(values, model, vocab_size)
    shards = Shards(directory)
    rows = values.get("vocab_size", vocab_size)
    # Files first, which say why tensors are missing; and no line for each tensor of another model.
    problems += shards.problems + ([] if problems else _tensor_problems(shards, model, rows))
    if problems:
        raise UserError(listed(f"{directory} cannot be imported:", problems))
    padded = padded_vocab_size(model, vocab_size, 1)
    kept = tensors(model, min(rows, padded))
    bad: list[str] = []
    chunks = [
        _published_chunk(tensor, shards, bad)
        for tensor in megatron_tensors(kept, dict.fromkeys(VOCABULARY, padded))
    ]
    files = [directory / "config.json", *shards.paths]
    if (directory / INDEX).exists():
        files.append(directory / INDEX)
    main = DTYPES[shards.described["lm_head.weight"][1]]
    precision = "fp32" if main is torch.float32 else "bf16"
    return Weights(
        *(chunks, files, precision, bad, config.unread(values), config.stated_length(values)),
        ends=config.ends_of_answers(directory),
        stated_deviation=config.stated_deviation(values),
    )


def _tensor_problems(shards: Shards, model: Model, rows: int) -> list[str]:
    wanted = {tensor.name: tensor for tensor in tensors(model, rows)}
    lost = {problem.partition(":")[0] for problem in shards.problems}
    files_lost = any(".safetensors" in name for name in lost)  # the index is one of them
    problems = []
    for name, tensor in wanted.items():
        if name not in shards.described:
            if not files_lost and name not in lost:  # else the files say why
                problems.append(f"{name}: missing")
            continue
        shape, code = shards.described[name]
        if shape != tensor.shape:
            problems.append(f"{name}: {list(shape)}, and the model wants {list(tensor.shape)}")
        if code not in DTYPES:
            problems.append(f"{name}: of type {code}; only {' and '.join(DTYPES)} are read")
    return problems + [f"{name}: not of this model" for name in shards.described if name not in wanted]


def _published_chunk(tensor: Megatron, shards: Shards, bad: list[str]) -> Chunk:
    shape = tensor.shape if tensor.expert is None else tensor.shape[1:]
    codes = {shards.described[source.name][1] for source in tensor.sources}
    # Queries, keys and values of different types become one tensor, of the wider type.
    dtype = torch.float32 if tensor.fp32 or "F32" in codes else torch.bfloat16

    def make() -> torch.Tensor:
        if len(tensor.sources) == 1 and tensor.sources[0].stop == shape[0]:
            whole = _rows(shards, tensor.sources[0], bad).to(dtype)
        else:
            whole = torch.zeros(shape, dtype=dtype)
            for source in tensor.sources:
                last = source.row + source.stop - source.start
                whole[source.row : last] = _rows(shards, source, bad)
        return whole

    return Chunk(tensor.key, tensor.shape, dtype, tensor.expert, make)


def _rows(shards: Shards, source: Source, bad: list[str]) -> torch.Tensor:
    found = shards.rows(source.name, source.start, source.stop)
    if not is_finite(found) and source.name not in bad:
        bad.append(source.name)
    return found


# ------------------------------------------------------------------------------------------ of Megatron


def megatron_weights(directory: Path, model: Model, vocab_size: int) -> Weights:
    """The tensors of a checkpoint of Megatron, such as iter_0000100; its optimizer is left out.

    Raises:
        UserError: it is of another model, incomplete or damaged; all differences at once.
    """
    problems = damaged_files(directory)  # first: torch would run what a strange list names
    reader = Reader(directory)
    padded = padded_vocab_size(model, vocab_size, 1)
    wanted = megatron_tensors(tensors(model, vocab_size), dict.fromkeys(VOCABULARY, padded))
    if problems := problems + megatron_differences(reader.listed, wanted, vocab_size):
        raise UserError(listed(f"{directory} cannot be imported:", problems))
    bad: list[str] = []
    read = LastRead(reader)
    chunks = [_megatron_chunk(tensor, reader, read, bad) for tensor in wanted]
    main = reader.tensors["output_layer.weight"][1]
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return Weights(chunks, files, "fp32" if main is torch.float32 else "bf16", bad)


def _megatron_chunk(tensor: Megatron, reader: Reader, read: LastRead, bad: list[str]) -> Chunk:
    dtype = torch.float32 if tensor.fp32 else reader.tensors[tensor.key][1]

    def make() -> torch.Tensor:
        whole = read(tensor.key).to(dtype)
        found = whole if tensor.expert is None else whole[tensor.expert]
        if tensor.key in VOCABULARY and len(found) != tensor.shape[0]:
            padded = torch.zeros(tensor.shape, dtype=dtype)
            rows = min(len(found), len(padded))
            padded[:rows] = found[:rows]
            found = padded
        if not is_finite(found) and tensor.key not in bad:
            bad.append(tensor.key)
        return found

    return Chunk(tensor.key, tensor.shape, dtype, tensor.expert, make)

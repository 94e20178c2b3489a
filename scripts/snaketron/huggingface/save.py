"""Export a checkpoint: from Megatron's tensors to a directory that transformers and vLLM read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron.config import Model
from snaketron.files import sha256, sha256_of, to_json, writing_directory
from snaketron.huggingface import config, shards
from snaketron.huggingface.index import INDEX
from snaketron.huggingface.metadata import megatron_differences
from snaketron.huggingface.names import Tensor, megatron_tensors, tensors
from snaketron.huggingface.torch_dist import LastRead, Reader, is_finite
from snaketron.lineage.record import Entry, Record, making, of_file
from snaketron.log import UserError, logger
from snaketron.wording import plural

import torch

_SHOWN = 20  # lines of a list of problems


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is exported."""

    tensors: Path  # a directory such as iter_0000100
    tokenizer: Path
    model: Model
    seq_length: int  # of its training, or of a longer one before it
    vocab_size: int  # tokens, without padding
    eos_token_ids: list[int]  # the tokenizer's own first, then what ends an answer
    pad_token_id: int

    @property
    def generation_config(self) -> bytes:
        """generation_config.json, which says where answers end."""
        return to_json({"eos_token_id": self.eos_token_ids, "pad_token_id": self.pad_token_id})


def export(
    checkpoint: Checkpoint, output: Path, *, source: Entry, card: str, shard_bytes: int = shards.SHARD_BYTES
) -> Record:
    """Write the directory `output`, complete or not at all; returns its record.

    Only one of Megatron's tensors, at most all experts of a layer, is in memory at a time. The bytes of all
    files but the record depend on the checkpoint alone. An export that was killed goes on after the last file
    of tensors that is complete; those before are read once, for their hashes.

    Args:
        source: the checkpoint, for the record.
        card: text of README.md.

    Raises:
        UserError: the checkpoint does not hold this model, or cannot be read; all differences at once.
    """
    reader = Reader(checkpoint.tensors)
    wanted = tensors(checkpoint.model, checkpoint.vocab_size)
    held = megatron_tensors(wanted, {})
    if problems := megatron_differences(reader.listed, held, checkpoint.vocab_size):
        raise UserError(listed(f"{checkpoint.tensors} does not hold the model of its settings:", problems))
    files = shards.plan(_described(wanted, reader), shard_bytes)
    parts = {tensor.name: tensor for tensor in wanted}
    begun = time.monotonic()
    with writing_directory(output, resuming=True) as aside:
        finished = shards.Finished(aside, _identity(checkpoint, source, files))
        if kept := sum(name in finished for name in files):
            logger.info("%s: %d of %d files are there already", output, kept, len(files))
        rows = Rows(reader)
        for name, shard in files.items():
            if name not in finished:
                entry = shards.write_shard(aside / name, shard, lambda name: rows.of(parts[name]))
                if not rows.not_finite:  # else an export that goes on from here would keep the file
                    finished.add(entry)
        rows.check()
        written = [[finished.entry(name) for name in files]]
        finished.close()
        written.append(small_files(checkpoint, aside, "config.json", _config(checkpoint, reader), card))
        shards.write_index(aside / INDEX, files)
        written.append([of_file(INDEX, aside / INDEX)])
        with making("export", output.name, outputs={}, record=aside / "record.json") as job:
            entries = [entry for group in written for entry in group]
            job.present = [
                Entry(e.name, str(output / e.name), e.sha256, e.bytes)
                for e in sorted(entries, key=lambda e: e.name)
            ]
            job.inputs = {"checkpoint": source}
            job.settings = {"model": checkpoint.model.model_dump()}
            job.counts = _counts(wanted, files, time.monotonic() - begun)
    logger.info(
        "%s: %d tensors, %.3f GB in %d files, %.0f MB/s",
        output,
        job.record.counts["tensors"],
        job.record.counts["bytes"] / 1e9,
        len(files),
        job.record.counts["bytes_per_second"] / 1e6,
    )
    return job.record


def _identity(checkpoint: Checkpoint, source: Entry, files: dict[str, list[shards.Described]]) -> str:
    """What the bytes of the files depend on. The list of the tensors has a random number of its own."""
    plan = {name: [(one.name, one.shape, str(one.dtype)) for one in shard] for name, shard in files.items()}
    return sha256_of(
        {"source": source.reference, "list": sha256(checkpoint.tensors / ".metadata"), "plan": plan}
    )


def listed(title: str, problems: list[str]) -> str:
    """A title and the problems; a long list is cut."""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "\n".join([title, *problems[:_SHOWN], *more])


def _described(wanted: Iterable[Tensor], reader: Reader) -> Iterator[shards.Described]:
    for tensor in wanted:
        dtype = torch.float32 if tensor.fp32 else reader.tensors[tensor.parts[0].key][1]
        yield shards.Described(tensor.name, tensor.shape, dtype)


class Rows:
    """Published tensors, made of the tensor that was read last and perhaps the next one.

    not_finite: names of those that hold numbers that are not finite, gathered while they are made.
    """

    def __init__(self, reader: Reader) -> None:
        self.directory = reader.directory
        self.not_finite: list[str] = []
        self._read = LastRead(reader)

    def of(self, tensor: Tensor) -> torch.Tensor:
        pieces = []
        for part in tensor.parts:
            whole = self._read(part.key)
            pieces.append((whole if part.expert is None else whole[part.expert])[part.start : part.stop])
        made = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        made = made.float() if tensor.fp32 else made
        if not is_finite(made):
            self.not_finite.append(tensor.name)
        return made

    def check(self) -> None:
        """`UserError` with the names of all tensors that hold numbers that are not finite."""
        if self.not_finite:
            count = plural(len(self.not_finite), "tensor")
            title = f"{self.directory} holds numbers that are not finite, in {count}:"
            raise UserError(listed(title, self.not_finite))


def small_files(
    checkpoint: Checkpoint, aside: Path, name: str, values: dict[str, Any], card: str
) -> list[Entry]:
    """Write a configuration of this name, generation_config.json, README.md, and the tokenizer's files."""
    texts = {name: to_json(values), "generation_config.json": checkpoint.generation_config}
    texts["README.md"] = card.encode()
    for file, text in texts.items():
        (aside / file).write_bytes(text)
    written = (*texts, *config.copy_tokenizer(checkpoint.tokenizer, aside))
    return [of_file(file, aside / file) for file in written]


def _config(checkpoint: Checkpoint, reader: Reader) -> dict[str, Any]:
    dtype = reader.tensors["output_layer.weight"][1]
    return config.published(
        checkpoint.model,
        vocab_size=checkpoint.vocab_size,
        seq_length=checkpoint.seq_length,
        dtype=str(dtype).removeprefix("torch."),
        eos_token_id=checkpoint.eos_token_ids[0],
        pad_token_id=checkpoint.pad_token_id,
    )


def _counts(wanted: list[Tensor], files: dict[str, list[shards.Described]], seconds: float) -> dict[str, Any]:
    size = sum(tensor.bytes for shard in files.values() for tensor in shard)
    return {
        "tensors": len(wanted),
        "parameters": sum(tensor.numbers for tensor in wanted),
        "bytes": size,
        "files": len(files),
        "bytes_per_second": round(size / max(seconds, 1e-9)),
    }

"""What became of documents: their split or why they were dropped, and who trained on them when."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snaketron.data.chats.order import Packing, PackOrder
from snaketron.data.text.order import SampleOrder
from snaketron.data.trace.drops import why_dropped
from snaketron.data.trace.rows import origins, written
from snaketron.files import read_json
from snaketron.lineage.catalogue import Catalogue, Made
from snaketron.lineage.uses import INFLUENCE, Source, reach
from snaketron.log import UserError
from snaketron.settings.registering import PACKS, TOKENS

import pyarrow.parquet as pq

CURATION = ("filtered", "curated")  # jobs whose files say which raw row each document was
READERS = {"tokens": "text", "render_chat": "chats"}  # jobs that end the way of a raw text, and their input


@dataclass
class Training:
    """When a training saw a document."""

    made: Made
    samples: list[int] = field(default_factory=list)  # from 0
    problem: str = ""  # why they are not known

    @property
    def steps(self) -> list[int]:
        """The steps, from 1, in rising order."""
        batch = self.made.record.settings["global_batch_size"]
        return sorted({sample // batch + 1 for sample in self.samples})

    @property
    def num_steps(self) -> int:
        return int(self.made.record.settings["train_iters"])


@dataclass
class Fate:
    """What a job that read a raw file made of one of its rows."""

    file: str  # as the record names it
    row: int
    shard: Made
    splits: list[str] = field(default_factory=list)  # of its sequences; empty where it was dropped
    numbers: list[int] = field(default_factory=list)  # of its sequences, in the split or the rendered file
    why: str = ""  # it is not trained on: dropped, held out, or in no pack
    trainings: list[Training] = field(default_factory=list)  # that may have trained on it

    @property
    def trained(self) -> list[Training]:
        return [training for training in self.trainings if training.samples]


def fates(catalogue: Catalogue, source: Source, rows: Sequence[int]) -> list[Fate]:
    """The fates of rows (from 1) of a raw file in each shard that they may be in.

    Raises `UserError` where no job has read the file as text or as conversations.
    """
    shards = [made for made in reach(catalogue, [source]).holders if made.record.kind in READERS]
    if not shards:
        raise UserError(f"{source.name}: no job made text or conversations of it, so it has no documents")
    found = []
    for shard in shards:
        for name in _names_read(catalogue, shard, source):
            of_kind = _of_text if shard.record.kind == "tokens" else _of_chats
            for file, numbers in _raw_rows(catalogue, source, shard, name, rows).items():
                found += of_kind(catalogue, shard, file, numbers)
    return found


def _raw_rows(
    catalogue: Catalogue, source: Source, shard: Made, name: str, rows: Sequence[int]
) -> Mapping[str, Sequence[int]]:
    """The rows by the names that a shard has for them: those of the raw files that curation read."""
    readers = [(made, entry) for made, entry in source.read if entry.path == name]
    makers = (maker for made, entry in readers if (maker := catalogue.made_by(entry, made)))
    maker = next((maker for maker in makers if maker.record.kind in CURATION), None)
    as_raw = any(made is shard for made, _ in readers)  # a shard names the origin of curated documents alone
    if maker is None or (as_raw and maker.record.kind != "curated"):
        return {name: rows}
    return origins(maker.output_place(maker.record.output("documents")), rows)


def _names_read(catalogue: Catalogue, shard: Made, source: Source) -> list[str]:
    """The files with the content of a source whose text a shard holds; other shards hold its copies."""
    before, waiting = {shard.digest}, [shard]
    while waiting:
        made = waiting.pop()
        texts = (entry for entry in made.record.inputs if entry.name not in INFLUENCE)
        makers = [maker for entry in texts if (maker := catalogue.made_by(entry, made))]
        waiting += [maker for maker in makers if maker.digest not in before]
        before |= {maker.digest for maker in makers}
    texts = (entry for made, entry in source.read if made.digest in before and entry.name not in INFLUENCE)
    return sorted({entry.path for entry in texts})


# ------------------------------------------------------------------------------------------------ text


def _of_text(catalogue: Catalogue, shard: Made, file: str, rows: Sequence[int]) -> list[Fate]:
    found = {row: Fate(file, row, shard) for row in rows}
    path = shard.place(shard.record.output("documents"))
    for _, row, split, number in written(path, file, rows, "split", "sequence"):
        found[row].splits.append(split)
        found[row].numbers.append(number)
    for fate in found.values():
        fate.why = _why_not_trained(catalogue, fate)
        for blend, prefix, numbers in _blended(catalogue, fate):
            fate.trainings += _pretrained(catalogue, blend, prefix, numbers)
        if fate.trainings:
            fate.why = ""
    return list(found.values())


def _blended(catalogue: Catalogue, fate: Fate) -> Iterator[tuple[Made, str, list[int]]]:
    """The blends with a document, and its shard and sequences there: also where the shard was registered."""
    for output in fate.shard.record.outputs:
        split = output.name.removesuffix(".bin")
        numbers = [n for n, its in zip(fate.numbers, fate.splits, strict=True) if its == split]
        if split == "train" and numbers:
            prefix = output.path.removesuffix(".bin")
            yield from ((blend, prefix, numbers) for blend in _users(catalogue, fate.shard, "blend"))
        registered = (user for user, _ in catalogue.users(output.sha256) if user.record.kind == TOKENS)
        for made in registered if numbers else ():
            settings = made.record.settings
            if settings["split"] == "train":
                prefix = settings["prefix"]
                yield from ((blend, prefix, numbers) for blend in _users(catalogue, made, "blend"))


def _pretrained(catalogue: Catalogue, blend: Made, prefix: str, sequences: list[int]) -> list[Training]:
    """When the trainings on a blend saw some sequences of one of its shards."""
    found = []
    for made in _trainings(catalogue, blend):
        training = Training(made)
        found.append(training)
        try:
            order = _order(_index(catalogue, blend, made))
            numbers = order.samples(prefix, sequences)
            training.samples = numbers[numbers < _num_samples(made)].tolist()
        except UserError as error:
            training.problem = str(error)
    return found


@functools.cache
def _order(index: Path) -> SampleOrder:
    """The order of an index, which takes a file for each shard to open."""
    return SampleOrder(index)


def _index(catalogue: Catalogue, blend: Made, training: Made) -> Path:
    """The directory of the index that a training read."""
    settings = training.record.settings
    wanted = {
        "seed": settings.get("data_seed", settings["seed"]),
        "seq_length": settings["seq_length"],
        "train_samples": _num_samples(training),
    }
    for made in _users(catalogue, blend, "index"):
        if {key: made.record.settings.get(key) for key in wanted} == wanted:
            return made.place(made.record.outputs[0])
    raise UserError(
        "the index that it read is not here any more: make it again with the settings of then "
        "(rule index_pretrain), and ask again"
    )


# --------------------------------------------------------------------------------------- conversations


def _of_chats(catalogue: Catalogue, shard: Made, file: str, rows: Sequence[int]) -> list[Fate]:
    found = {row: Fate(file, row, shard) for row in rows}
    path = shard.place(shard.record.outputs[0])
    for number, row, split in written(path, file, rows, "split"):
        found[row].splits.append(split)
        found[row].numbers.append(number)
    for fate in found.values():
        fate.why = _why_not_trained(catalogue, fate)
    if trained := [fate for fate in found.values() if "train" in fate.splits]:
        for packing in _users(catalogue, shard, "pack_sft"):
            _of_packs(catalogue, trained, packing)
    return list(found.values())


def _of_packs(catalogue: Catalogue, found: list[Fate], packing: Made) -> None:
    """Add the trainings on the packs of a job to the fates of conversations of one rendered file."""
    record = packing.record
    inputs = record.inputs_named("chats")
    files = [packing.place(entry) for entry in inputs]
    packs = Packing(files, record.settings, "train")
    before = 0
    for path, entry in zip(files, inputs, strict=True):
        if entry.sha256 == found[0].shard.record.outputs[0].sha256:
            break
        before += pq.read_metadata(path).num_rows
    packed = record.output("train")
    numbers = packs.packs_of([before + n for fate in found for n in fate.numbers], packing.place(packed))
    readers = [user for user, _ in catalogue.users(packed.sha256) if user.record.kind == PACKS]
    orders = []
    for holder in (packing, *readers):  # what was registered has the same packs
        place = holder.record.output("train").path
        for blend in _users(catalogue, holder, "blend_sft"):
            value = read_json(blend.place(blend.record.outputs[0]))
            for made in _trainings(catalogue, blend):
                order = PackOrder(value, _num_samples(made), made.record.settings["seed"])
                orders.append((made, order, place))
    for fate in found:
        wanted = [before + n for n in fate.numbers]
        if missing := [number for number in wanted if number not in numbers]:
            fate.why = f"in no pack: {packs.why_not(missing[0])}"
        held = {numbers[number] for number in wanted if number in numbers}
        for made, order, place in orders:
            samples = order.samples({(place, pack) for pack in held})
            fate.trainings.append(Training(made, samples.tolist()))


# ---------------------------------------------------------------------------------------------- shared


def _why_not_trained(catalogue: Catalogue, fate: Fate) -> str:
    """Why no training reads a row; empty where one may."""
    if not fate.splits:
        return why_dropped(catalogue, fate.shard, fate.file, fate.row)
    if "train" in fate.splits:
        return ""
    purpose = {"valid": "validation", "test": "the test"}
    return f"held out for {' and '.join(purpose[split] for split in sorted(set(fate.splits)))}"


def _users(catalogue: Catalogue, made: Made, kind: str) -> list[Made]:
    """The jobs of a kind that used what another one made, each once."""
    return list(
        {user.digest: user for user, _ in catalogue.users_of(made) if user.record.kind == kind}.values()
    )


def _trainings(catalogue: Catalogue, blend: Made) -> list[Made]:
    """The trainings on a blend."""
    return [made for made in _users(catalogue, blend, "checkpoint") if made.record.is_training]


def _num_samples(training: Made) -> int:
    settings = training.record.settings
    return int(settings["train_iters"] * settings["global_batch_size"])

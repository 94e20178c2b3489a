"""A small lineage: two raw files, a tokenizer of one of them, two shards, a blend and two trainings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from snaketron.files import sha256
from snaketron.lineage.record import Entry, Record, making, of_user, read

import pytest

BLEND = "data/pretrain/one/blend.json"


def write(path: str, text: str) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def job(kind: str, name: str, record: str, inputs: dict, outputs: dict[str, str], **settings) -> Record:
    """A job that writes its path, hashes of inputs and its settings into each output, and a record."""
    paths = {key: Path(path) for key, path in outputs.items()}
    with making(kind, name, outputs=paths, record=Path(record)) as made:
        for key, aside in made.aside.items():
            aside.write_text(f"{outputs[key]} {sorted(hashes(inputs))} {settings}")
        made.inputs, made.settings = inputs, settings
    return made.record


def hashes(inputs: dict) -> Iterator[str]:
    """The hashes of all inputs; where one is a record, those of the outputs that it lists."""
    for given in inputs.values():
        for one in given if isinstance(given, list) else [given]:
            if isinstance(one, Path) and one.suffix == ".json" and "tokens" in one.parts:
                yield from (output.sha256 for output in read(one).outputs)
            else:
                yield one.sha256 if isinstance(one, Entry) else sha256(one)


def train(
    stage: str, key: str, blend: str, base: str | None = None, *, root: str = "ckpt", **settings
) -> None:
    """A finished training `<root>/<stage>`, a link to its version, on a base below ckpt."""
    version = Path(root, "versions", f"{stage.replace('/', '_')}-{key}")
    weights = write(str(version / "iter_0000010/weights"), f"{stage} {settings}")
    with making("checkpoint", stage, outputs={}, record=version / "record.json") as made:
        made.present = [Entry("weights", str(weights), *_state(weights))]
        made.inputs = {"blend": Path(blend)}
        if base:
            made.inputs["base"] = Entry("base", f"ckpt/{base.rpartition('-')[0]}", version=base)
        made.settings, made.counts, made.key = settings, {"iterations": 10}, key
    link = Path(root, stage)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(version.absolute(), target_is_directory=True)


def _state(path: Path) -> tuple[str, int]:
    entry = of_user(path)
    return entry.sha256, entry.bytes


def tokens(name: str, raw: str) -> str:
    """A shard of a raw file; returns its record."""
    root = "data/tokens/docs"
    inputs = {"text": of_user(Path(raw)), "tokenizer": Path("data/tokenizer/tokenizer.json")}
    outputs = {"train.bin": f"{root}/train/{name}.bin", "documents": f"{root}/{name}.parquet"}
    job("tokens", f"docs/{name}", f"{root}/{name}.json", inputs, outputs, corpus="docs")
    return f"{root}/{name}.json"


def run(key: str = "0a") -> None:
    """All jobs, on the raw files that are there; `key` is that of the first training."""
    made = {"tokenizer.json": "data/tokenizer/tokenizer.json"}
    job("tokenizer", "tokenizer", "data/tokenizer/record.json", {"text": [Path("raw/a.jsonl")]}, made)
    shards = [Path(tokens(name, f"raw/{name}.jsonl")) for name in ("a", "b")]
    inputs = {"records": shards, "tokenizer": Path("data/tokenizer/tokenizer.json")}
    outputs = {"blend.json": "data/pretrain/one/blend.json"}
    job("blend", "one", "data/pretrain/one/record.json", inputs, outputs, weight=1.0)
    train("pretrain/one", key, "data/pretrain/one/blend.json")
    train("sft", "0b", "data/pretrain/one/blend.json", base=f"pretrain/one-{key}", seed=1)


@pytest.fixture
def lineage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which the test runs."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    for name in ("a", "b"):
        write(f"raw/{name}.jsonl", f'{{"text": "{name}"}}\n')
    run()
    return directory


@pytest.fixture
def rebuilt(lineage: Path) -> Path:
    """A second root of checkpoints, whose sft is built on one of ckpt; then all of ckpt was trained again.

    `imp/ckpt/sft` is made from `sft-0b`, and that from `pretrain/one-0a`. Both links of ckpt lead elsewhere.
    """
    train("sft", "0f", BLEND, base="sft-0b", root="imp/ckpt", seed=3)
    train("pretrain/one", "0d", BLEND, seed=2)
    train("sft", "0e", BLEND, base="pretrain/one-0d", seed=2)
    return lineage


def export(version: str) -> None:
    """hf/sft of a checkpoint. Models of one architecture have the same config.json."""
    outputs = {name: Path("hf/sft", name) for name in ("config.json", "model")}
    with making("export", "sft", outputs=outputs, record=Path("hf/sft/record.json")) as made:
        made.aside["config.json"].write_text("{}")
        made.aside["model"].write_text(version)
        made.inputs = {"checkpoint": Entry("checkpoint", "ckpt/sft", version=version)}


@pytest.fixture
def imported(lineage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second working directory, whose model began with the export of the first one, and is exported."""
    export("sft-0b")
    beside = lineage.parent / "beside"
    beside.mkdir()
    monkeypatch.chdir(beside)
    with making(
        "checkpoint", "base/it", outputs={}, record=Path("ckpt/versions/base_it-0c/record.json")
    ) as made:
        made.inputs = {
            "weights": [of_user(Path("..", lineage.name, "hf/sft", n)) for n in ("config.json", "model")]
        }
        made.key = "0c"
    link = Path("ckpt/base/it")
    link.parent.mkdir()
    link.symlink_to("../versions/base_it-0c")
    train("sft", "0d", str(write("raw/more.json", "[]")), base="base/it-0c")
    export("sft-0d")
    return beside


def prune(version: str) -> None:
    shutil.rmtree(Path("ckpt/versions", version.replace("/", "_")))

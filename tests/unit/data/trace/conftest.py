"""A working directory with records that are written by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketron.files import sha256
from snaketron.lineage.record import Entry, making

import numpy as np
import pytest


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def record(work: Path) -> Callable[..., Path]:
    """record(kind, name, path, inputs, outputs, settings, counts, key) about files that lie there."""

    def write(
        kind: str,
        name: str,
        path: str,
        inputs: Mapping[str, Any],
        outputs: Mapping[str, str],
        settings: Mapping[str, Any] | None = None,
        counts: Mapping[str, Any] | None = None,
        key: str | None = None,
    ) -> Path:
        with making(kind, name, outputs={}, record=Path(path)) as job:
            job.inputs = dict(inputs)
            job.present = [
                Entry(output, place, sha256(Path(place)) if Path(place).is_file() else "d1", 1)
                for output, place in outputs.items()
            ]
            job.settings, job.counts, job.key = dict(settings or {}), dict(counts or {}), key
        return Path(path)

    return write


@pytest.fixture
def train(record: Callable[..., Path]) -> Callable[..., Path]:
    """train(stage, key, blend, base) of 4 steps of 2 samples of 4 tokens."""

    def make(
        stage: str, key: str, blend: str | None = None, base: str | None = None, **settings: Any
    ) -> Path:
        directory = f"ckpt/versions/{stage.replace('/', '_')}-{key}"
        inputs: dict[str, Any] = {"blend": Path(blend)} if blend else {}
        if base:
            inputs["base"] = Entry("base", "ckpt/base", version=base)
        values = {"seed": 7, "seq_length": 4, "global_batch_size": 2, "train_iters": 4} | settings
        return record("checkpoint", stage, f"{directory}/record.json", inputs, {}, values, {}, key)

    return make


def save_index(
    directory: Path, shards: Mapping[str, tuple[Sequence, Sequence, Sequence]], blended: Sequence[Sequence]
) -> None:
    """What megatron-core leaves: document, sample and shuffle index of each shard, and those of the blend."""
    directory.mkdir(parents=True)
    for number, (prefix, arrays) in enumerate(shards.items()):
        (directory / f"{number}-GPTDataset-train-description.txt").write_text(
            f'{{"dataset_path": "{prefix}"}}'
        )
        for name, array in zip(("document_index", "sample_index", "shuffle_index"), arrays, strict=True):
            np.save(directory / f"{number}-GPTDataset-train-{name}.npy", np.array(array, np.int32))
    listed = ", ".join(f'{{"dataset_path": "{prefix}"}}' for prefix in shards)
    (directory / "b-BlendedDataset-train-description.txt").write_text(f'{{"datasets": [{listed}]}}')
    for name, array in zip(("dataset_index", "dataset_sample_index"), blended, strict=True):
        np.save(directory / f"b-BlendedDataset-train-{name}.npy", np.array(array, np.int64))

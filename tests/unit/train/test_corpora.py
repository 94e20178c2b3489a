"""Pretraining reports its losses by corpus, and trains as it did without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.data.text import index
from snaketron.data.text.blend import load_blend
from snaketron.data.text.order import SampleOrder
from snaketron.data.tokenizer import tokenizer_info
from snaketron.jobs.lines import read_metrics
from snaketron.settings.training import IndexSettings
from snaketron.train.batches import PretrainBatches
from snaketron.train.build import build_training
from snaketron.train.loop import Trainer

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

STEPS = 4
KEYS = {"tokens": STEPS * 64, "log_interval": 4, "eval_samples": 6, "decay_tokens": 0}


class Unnamed(PretrainBatches):
    """The batches of before, which knew no corpora."""

    mixed = False

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.sources = ()

    def collate(self, split: Any, indices: Sequence[int]) -> dict[str, Any]:
        batch = super().collate(split, indices)
        without = {"source": torch.zeros(1), "num_sources": 1, "mixed": False}
        return batch | {"report": dataclasses.replace(batch["report"], **without)}


@pytest.fixture
def make(blend_of, tokenizer_dir: Path, tmp_path: Path, settings) -> Callable[..., PretrainBatches]:
    """make(kind) gives the batches of two corpora, `long` and `short`, or splits as a whole of them."""
    train, run = settings(**KEYS)
    numbers = IndexSettings(seed=train.seed, seq_length=16, train_samples=4 * STEPS)

    def made(kind: type[PretrainBatches] = PretrainBatches, **splits: str) -> PretrainBatches:
        blend = tmp_path / "blend.json"
        if not blend.exists():
            blend_of("long", "short", valid_fraction=0.3, **splits)
            index.build(blend, numbers, output=tmp_path / "index", record=tmp_path / "index.json")
        return kind(
            blend,
            train,
            tokenizer_info(tokenizer_dir),
            index=tmp_path / "index",
            micro_batch_size=run.micro_batch_size,
            eval_samples=run.eval_samples,
        )

    return made


@pytest.fixture
def trainer(settings) -> Callable[[], Trainer]:
    def made() -> Trainer:
        torch.manual_seed(1)
        return Trainer(build_training(*settings(**KEYS), 300))

    return made


def test_each_sequence_is_of_the_corpus_that_it_was_read_from(make, tmp_path: Path):
    """The index, read without megatron-core, says which samples each shard is in."""
    batches, order = make(), SampleOrder(tmp_path / "index")
    expected = dict.fromkeys(range(4 * STEPS), "")
    for shard in load_blend(tmp_path / "blend.json").train.shards:
        sequences = range(len(IndexedDataset(shard.prefix)))
        expected |= {int(i): shard.corpus for i in order.samples(shard.prefix, sequences)}
    reports = [batch["report"] for batch in batches.micro_batches("train", 0, 4 * STEPS)]
    found = [batches.sources[i] for report in reports for i in report.source.tolist()]
    assert found == [expected[i] for i in range(4 * STEPS)] and found.count("long") == 2 * STEPS
    assert any(len(set(report.source.tolist())) == 2 for report in reports)
    tokens = {corpus.corpus: corpus.tokens for corpus in load_blend(tmp_path / "blend.json").train.corpora}
    assert batches.wanted() == {name: (0.5, tokens[name] / 16) for name in ("long", "short")}


def test_a_corpus_that_is_held_out_is_validated_by_its_name_and_not_trained(make, trainer, tmp_path: Path):
    batches = make(short="valid")
    assert (batches.sources, batches.wanted().keys()) == (("long", "short"), {"long"})
    trainer().train(batches, tmp_path / "out")
    lines, _ = read_metrics(tmp_path / "out/metrics.jsonl")
    assert [line["sources"].keys() for line in lines if "sources" in line] == [{"long"}]
    assert {frozenset(line["valid_sources"]) for line in lines if "valid_sources" in line} == {
        frozenset({"long", "short"})
    }


def test_corpora_change_nothing_but_what_is_reported(make, trainer, tmp_path: Path):
    """Two trainings: one knows the corpora. Their checkpoints and other metrics are equal to the bit.

    A third one goes on from a checkpoint of the one that does not, which was made between two lines of
    metrics. The line after it has the corpora of the last step, and all else as if it had never stopped.
    """
    lines, saved = {}, {}
    for name, kind in (("before", Unnamed), ("now", PretrainBatches), ("resumed", PretrainBatches)):
        directory, one = tmp_path / name, trainer()
        if name == "resumed":
            begun = trainer()
            for _ in range(STEPS - 1):
                begun._step(make(Unnamed))
            begun.save(directory)
            assert one.resume(directory)
        one.train(make(kind), directory)
        found = [line for line in read_metrics(directory / "metrics.jsonl")[0] if line["iteration"] == STEPS]
        lines[name] = {key: value for line in found for key, value in line.items() if key != "timing"}
        last = directory / f"iter_{STEPS:07}"
        saved[name] = [path.read_bytes() for path in sorted(last.glob("*.distcp"))]
    assert saved["now"] == saved["before"] == saved["resumed"]
    sources, resumed = lines["now"].pop("sources"), lines["resumed"].pop("sources")
    valid = lines["now"].pop("valid_sources")
    assert lines["resumed"].pop("valid_sources") == valid and valid.keys() == {"long", "short"}
    assert lines["now"] == lines["before"] == lines["resumed"]
    print(lines["now"], sources, resumed, valid)
    assert {name: (of["samples"], of["trained_tokens"]) for name, of in sources.items()} == {
        "long": (2 * STEPS, 32 * STEPS),
        "short": (2 * STEPS, 32 * STEPS),
    }
    assert sum(of["loss"] for of in sources.values()) / 2 == pytest.approx(lines["now"]["loss"], rel=1e-6)
    assert sum(of["samples"] for of in resumed.values()) == 4

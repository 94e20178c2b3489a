"""What lineage says of samples and steps is what trainings read: the text of two shards, and packs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.data.chats.order import PackOrder
from snaketron.data.text import blend, index
from snaketron.data.text.order import SampleOrder
from snaketron.data.tokenizer import tokenizer_info
from snaketron.files import read_json
from snaketron.settings.training import IndexSettings
from snaketron.train.sft_batches import SftBatches

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

SEED, LENGTH, SAMPLES = 3, 16, 90  # several epochs of the second shard


@pytest.mark.parametrize("names", [("long",), ("long", "short")])
def test_each_sequence_is_in_the_samples_in_which_megatron_core_reads_it(
    blend_of, tokenizer_dir: Path, names: tuple[str, ...]
):
    path = blend_of(*names)
    directory = path.parent / "index"
    settings = IndexSettings(seed=SEED, seq_length=LENGTH, train_samples=SAMPLES)
    index.build(path, settings, output=directory, record=path.parent / "index.json")
    dataset, _ = index.load(directory, path, tokenizer_info(tokenizer_dir), settings)["train"]
    seen = defaultdict(set)
    for sample in range(SAMPLES):
        dataset[sample]
        of_shard, number = dataset, sample
        if len(names) > 1:
            of_shard = dataset.datasets[dataset.dataset_index[sample]]
            number = dataset.dataset_sample_index[sample]
        _, sequences, _ = of_shard._query_document_sample_shuffle_indices(number)
        for sequence in sequences.tolist():
            seen[of_shard.dataset.prefix, sequence].add(sample)
    found = SampleOrder(directory)
    for shard in blend.load_blend(path).train.shards:
        for sequence in range(len(IndexedDataset(shard.prefix))):
            samples = found.samples(shard.prefix, [sequence])
            assert set(samples[samples < SAMPLES].tolist()) == seen[shard.prefix, sequence]
    assert len({sample for samples in seen.values() for sample in samples}) == SAMPLES


def test_each_pack_is_in_the_samples_in_which_sft_reads_it(packed_blend, tokenizer_dir: Path, sft_settings):
    """A pack is recognised by its only conversation, of the ids 10, 11 or 20 ... 24."""
    packs = {"one": [[[(10, 1), (10, 1)]], [[(11, 1), (11, 1)]]]}
    packs["two"] = [[[(20 + i, 1), (20 + i, 1)]] for i in range(5)]
    path = packed_blend(train=packs)
    settings, _ = sft_settings()
    batches = SftBatches.load(path, settings, tokenizer_info(tokenizer_dir), eval_samples=2)
    read = [int(batches.pack("train", sample)[1].input_ids[0]) for sample in range(16)]
    value = read_json(path)
    sources = value["splits"]["train"]
    for source in sources:
        source["files"][0]["packs"] = len(packs[source["source"]])  # as rule blend_sft writes it
    order = PackOrder(value, 16, settings.seed)
    for source in sources:
        for number in range(len(packs[source["source"]])):
            first = packs[source["source"]][number][0][0][0]
            samples = order.samples([(source["files"][0]["path"], number)])
            assert samples.tolist() == [sample for sample, token in enumerate(read) if token == first]

"""Batches by hand, and the same samples whoever asks, how often and from where."""

from __future__ import annotations

import json
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.data import index
from snaketron.data import tokenizer as tokenizers
from snaketron.data.packed import Pack, join, write
from snaketron.files import write_json
from snaketron.log import UserError
from snaketron.train.batches import PretrainBatches, SftBatches, collate_pack

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset

PAD = 99


def pack(*conversations: list[tuple[int, int]]) -> Pack:
    """Conversations of (id, whether the assistant said it)."""
    return join(
        [tuple(np.array(column, dtype=np.int32) for column in zip(*c, strict=True)) for c in conversations]
    )


TWO = pack([(5, 0), (6, 1), (7, 1)], [(8, 0), (9, 1)])


def listed(batch: dict, *keys: str) -> list[list]:
    return [batch[key][0].tolist() for key in keys]


# --------------------------------------------------------------------------------------- collate_pack


def test_a_pack_is_padded_to_its_size_with_a_sequence_of_its_own():
    batch = collate_pack(TWO, 8, PAD)
    assert listed(batch, "input_ids", "labels", "loss_mask", "position_ids", "padding_mask") == [
        [5, 6, 7, 8, 9, PAD, PAD, PAD],
        [6, 7, PAD, 9, PAD, PAD, PAD, PAD],  # the last token of a conversation predicts nothing
        [1, 1, 0, 1, 0, 0, 0, 0],
        [0, 1, 2, 0, 1, 0, 1, 2],
        [False] * 5 + [True] * 3,
    ]
    sequences = batch["packed_seq_params"]
    assert sequences.cu_seqlens_q.tolist() == sequences.cu_seqlens_kv.tolist() == [0, 3, 5, 8]
    assert (sequences.max_seqlen_q, sequences.max_seqlen_kv, sequences.total_tokens) == (3, 3, 8)
    assert sequences.qkv_format == "thd" and sequences.cu_seqlens_q.dtype is torch.int32


def test_a_full_pack_has_no_padding():
    batch = collate_pack(TWO, 5, PAD)
    assert listed(batch, "labels", "position_ids") == [[6, 7, PAD, 9, PAD], [0, 1, 2, 0, 1]]
    assert not batch["padding_mask"].any()
    assert batch["packed_seq_params"].cu_seqlens_q.tolist() == [0, 3, 5]


def test_padding_that_is_the_longest_sequence_counts_as_one():
    sequences = collate_pack(TWO, 16, PAD)["packed_seq_params"]
    assert sequences.cu_seqlens_q.tolist() == [0, 3, 5, 16] and sequences.max_seqlen_q == 11


def test_what_is_trained_is_what_the_assistant_said():
    batch = collate_pack(TWO, 8, PAD)
    labels, mask = batch["labels"][0], batch["loss_mask"][0].bool()
    assert labels[mask].tolist() == [6, 7, 9]


def test_sequence_parallel_ranks_get_their_part_of_the_padding_mask(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 1)
    batch = collate_pack(TWO, 8, PAD)
    assert batch["padding_mask"].tolist() == [[False, True, True, True]]
    assert batch["input_ids"].shape == (1, 8)  # the embedding takes all of it


def test_a_pack_longer_than_its_footer_says_is_our_mistake():
    with pytest.raises(AssertionError, match="a pack of 5 tokens where the footer says 4"):
        collate_pack(TWO, 4, PAD)


# ----------------------------------------------------------------------------------------- pretraining


@pytest.fixture
def make(blend_path: Path, tokenizer_dir: Path, tmp_path: Path, settings):
    def batches(name: str = "index", eval_samples: int = 5, **keys) -> PretrainBatches:
        train, run = settings(**keys)
        directory = tmp_path / name
        if not directory.exists():
            index.build(
                blend_path,
                seed=train.seed,
                seq_length=train.seq_length,
                train_samples=train.train_iters * train.global_batch_size,
                output=directory,
                record=directory.with_suffix(".json"),
            )
        return PretrainBatches(
            blend_path,
            train,
            tokenizers.info(tokenizer_dir),
            index=directory,
            micro_batch_size=run.micro_batch_size,
            eval_samples=eval_samples,
        )

    return batches


def rows(batches: PretrainBatches, split: str, first: int, count: int) -> list[list[int]]:
    return [row.tolist() for b in batches.micro_batches(split, first, count) for row in b["input_ids"]]


def test_a_sequence_is_followed_by_its_labels(make, blend_path: Path):
    batch = next(make().micro_batches("train", 0, 2))
    assert set(batch) == {"input_ids", "labels", "loss_mask", "position_ids"}
    assert all(tensor.shape == (2, 16) for tensor in batch.values())
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert batch["loss_mask"].eq(1).all() and batch["position_ids"][0].tolist() == list(range(16))
    # Documents follow each other in one stream; a sequence is 16 tokens of it and the label after.
    documents = [list(map(int, d)) for d in IndexedDataset(str(blend_path.parent / "train/part"))]
    sequence = [*batch["input_ids"][0].tolist(), int(batch["labels"][0, -1])]
    pieces = "|".join(map(str, sequence)).split("|0|")  # 0 ends a document
    text = ["|".join(map(str, d)) for d in documents]
    assert len(pieces) > 1 and all(any(piece in t for t in text) for piece in pieces)


def test_data_parallel_ranks_share_the_global_batch(make, monkeypatch: pytest.MonkeyPatch):
    batches = make()
    everything = rows(batches, "train", 8, 8)
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda rank=rank: rank)
        parts.append(rows(batches, "train", 8, 8))
    # Micro-batches of two: samples 8, 9 | 10, 11 | 12, 13 | 14, 15, dealt in turn.
    assert parts[0] == everything[0:2] + everything[4:6]
    assert parts[1] == everything[2:4] + everything[6:8]


def test_held_out_samples_are_rounded_up_for_all_ranks(make, monkeypatch: pytest.MonkeyPatch):
    batches = make()
    assert [batches.round_up(n) for n in (1, 2, 5)] == [2, 2, 6]
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 3)
    assert [batches.round_up(n) for n in (1, 6, 7)] == [6, 6, 12]


def test_a_restart_sees_the_same_samples(make, tmp_path: Path):
    everything = rows(make(), "train", 0, 20)
    assert rows(make(), "train", 8, 12) == everything[8:]
    assert rows(make("rebuilt"), "train", 0, 20) == everything
    assert rows(make("other", seed=5), "train", 0, 20) != everything


def test_how_a_training_is_run_needs_no_other_index(make, tmp_path: Path):
    """One index serves every micro-batch size and number of held-out samples, and nothing is added to it."""
    first = make()
    files = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "index").iterdir())
    second = make(micro_batch_size=4, eval_samples=1000)
    assert rows(second, "train", 0, 8) == rows(first, "train", 0, 8)
    assert rows(second, "valid", 0, 8) == rows(first, "valid", 0, 8)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "index").iterdir()) == files


def test_held_out_sequences_are_read_again_after_the_last(make, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    batches = make(eval_samples=1000)
    count = batches.datasets["valid"][1]
    assert f"valid has {count} sequences; the eval_samples 1000 read some again" in caplog.text
    assert rows(batches, "valid", 2 * count, 2) == rows(batches, "valid", 0, 2)


def test_a_split_without_tokens_is_none(make):
    batches = make()
    assert [batches.has(split) for split in ("train", "valid", "test")] == [True, True, False]


def test_a_blend_of_another_tokenizer_is_refused(
    blend_path: Path, tokenizer_dir: Path, tmp_path: Path, settings
):
    value = json.loads(blend_path.read_text())
    other = tmp_path / "blend.json"
    other.write_text(json.dumps(value | {"tokenizer": "f" * 64}))
    info = tokenizers.info(tokenizer_dir)
    with pytest.raises(UserError) as error:
        PretrainBatches(other, settings()[0], info, index=tmp_path, micro_batch_size=2, eval_samples=4)
    assert str(error.value).startswith(f"{other}: made with another tokenizer (sha256 ffffffffffff, and ")
    assert info.sha256[:12] in str(error.value)


# ------------------------------------------------------------------------------------------------- SFT


@pytest.fixture
def sft(tmp_path: Path, tokenizer_dir: Path, settings):
    """Batches over two sources of 6 and 3 packs, each of one token that says which, weighed 2 to 1."""
    info = tokenizers.info(tokenizer_dir)
    made = {"tokenizer_sha256": info.sha256, "template_sha256": "t", "pack_size": 16}
    sources = []
    for name, first, count, weight in (("a", 100, 6, 2 / 3), ("b", 200, 3, 1 / 3)):
        path = tmp_path / f"{name}.parquet"
        write(path, [pack([(1, 0), (first + i, 1)]) for i in range(count)], made)
        file = {"path": str(path), "bytes": path.stat().st_size}
        sources.append({"source": name, "weight": weight, "files": [file]})
    write_json(
        tmp_path / "blend.json", made | {"splits": {"train": sources, "valid": sources[:1], "test": []}}
    )

    def batches(template: str = "t") -> SftBatches:
        return SftBatches(tmp_path / "blend.json", settings()[0], info, template, eval_samples=4)

    return batches


def test_packs_come_by_weight_and_each_once_an_epoch(sft):
    """Of 9 packs a third is of `b`; 9 samples are one epoch of both sources."""
    seen = [int(b["input_ids"][0, 1]) for b in sft().micro_batches("train", 0, 9)]
    assert sorted(seen) == [*range(100, 106), *range(200, 203)]
    assert [seen[i : i + 3] for i in (0, 3, 6)] == [
        [x for x in seen[i : i + 3] if x < 200] + [x for x in seen[i : i + 3] if x >= 200] for i in (0, 3, 6)
    ]


def test_sft_sees_the_same_packs_after_a_restart(sft):
    seen = [int(b["input_ids"][0, 1]) for b in sft().micro_batches("train", 0, 20)]
    assert [int(b["input_ids"][0, 1]) for b in sft().micro_batches("train", 12, 8)] == seen[12:]


def test_a_split_without_packs_is_absent(sft):
    assert [sft().has(split) for split in ("train", "valid", "test")] == [True, True, False]


def test_packs_of_another_template_are_refused(sft, tmp_path: Path):
    with pytest.raises(UserError, match="was made with template_sha256 t, and u is wanted"):
        sft("u")

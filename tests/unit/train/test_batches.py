"""Batches of text by hand, and the same samples whoever asks, how often and from where."""

from __future__ import annotations

import json
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.data.text import index
from snaketron.data.tokenizer import tokenizer_info
from snaketron.log import UserError
from snaketron.train.batches import PretrainBatches, sequences

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset


@pytest.fixture
def make(blend_path: Path, tokenizer_dir: Path, tmp_path: Path, settings):
    def batches(name: str = "index", eval_samples: int = 5, **keys) -> PretrainBatches:
        train, run = settings(**keys)
        directory = tmp_path / name
        if not directory.exists():
            record = directory.with_suffix(".json")
            index.build(blend_path, train.index, output=directory, record=record)
        return PretrainBatches(
            blend_path,
            train,
            tokenizer_info(tokenizer_dir),
            index=directory,
            micro_batch_size=run.micro_batch_size,
            eval_samples=eval_samples,
        )

    return batches


def rows(batches: PretrainBatches, split: str, first: int, count: int) -> list[list[int]]:
    return [row.tolist() for b in batches.micro_batches(split, first, count) for row in b["input_ids"]]


def test_a_sequence_is_followed_by_its_labels(make, blend_path: Path):
    batch = next(make().micro_batches("train", 0, 2))
    assert set(batch) == {"input_ids", "labels", "loss_mask", "position_ids", "report"}
    assert all(batch[name].shape == (2, 16) for name in ("input_ids", "labels", "position_ids"))
    assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert batch["position_ids"][0].tolist() == list(range(16))
    # Every token counts 1, and of the next but one, which the last one has not, 16 / 15.
    expected = torch.ones(2, 2, 16)
    expected[1] *= 16 / 15
    expected[1, :, -1] = 0
    torch.testing.assert_close(batch["loss_mask"], expected)
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
    said = f"pretrain/one: valid has {count} sequences and eval_samples is 1000, so some are read twice"
    assert said in caplog.text
    assert rows(batches, "valid", 2 * count, 2) == rows(batches, "valid", 0, 2)


def test_a_split_without_tokens_is_none(make):
    batches = make()
    assert [batches.has(split) for split in ("train", "valid", "test")] == [True, True, False]


def test_a_blend_of_another_tokenizer_is_refused(
    blend_path: Path, tokenizer_dir: Path, tmp_path: Path, settings
):
    value = json.loads(blend_path.read_text(encoding="utf-8"))
    other = tmp_path / "blend.json"
    other.write_text(json.dumps(value | {"tokenizer": "f" * 64}))
    info = tokenizer_info(tokenizer_dir)
    with pytest.raises(UserError) as error:
        PretrainBatches(other, settings()[0], info, index=tmp_path, micro_batch_size=2, eval_samples=4)
    assert str(error.value).startswith(f"{other}: made with another tokenizer (sha256 ffffffffffff, and ")
    assert info.sha256[:12] in str(error.value)


def test_depths_that_look_beyond_a_sequence_have_no_weight_there():
    """Of three tokens, depth 1 predicts the second and third label, and depths 3 and 4 none."""
    ids = torch.ones(1, 3, dtype=torch.int64)
    weights = sequences(ids, ids, ids, 4)["loss_mask"]
    assert weights[:, 0].tolist() == [[1, 1, 1], [1.5, 1.5, 0], [3, 0, 0], [0, 0, 0], [0, 0, 0]]

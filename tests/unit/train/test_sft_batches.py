"""Batches of packs by hand, and the same packs whoever asks, how often and from where."""

from __future__ import annotations

import json
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.data.chats.packs import Pack, join, loss_weights
from snaketron.data.tokenizer import tokenizer_info
from snaketron.log import UserError
from snaketron.train.losses import Sums
from snaketron.train.sft_batches import SftBatches, collate_pack

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

PAD = 0  # as behind the last token in the shift of multi-token prediction


def pack(*conversations: list[tuple[int, int]]) -> Pack:
    """Conversations of (id, whether the assistant said it)."""
    return join(
        [tuple(np.array(column, dtype=np.int32) for column in zip(*c, strict=True)) for c in conversations]
    )


TWO = pack([(5, 0), (6, 1), (7, 1)], [(8, 0), (9, 1)])


def listed(batch: dict, *keys: str) -> list[list]:
    return [batch[key][0].tolist() for key in keys]


def collate(pack: Pack, pack_size: int, depths: int = 0, **keys) -> dict:
    """With the weights of one pack by itself, averaged over tokens."""
    return collate_pack(pack, pack_size, weights=loss_weights(pack, depths, "token")[0], **keys)


def ends(batch: dict) -> list[int]:
    """Where the sequences end that are not empty."""
    bounds = batch["packed_seq_params"].cu_seqlens_q
    assert bounds.tolist() == batch["packed_seq_params"].cu_seqlens_kv.tolist()
    first, *others = bounds.unique_consecutive().tolist()
    assert first == 0
    return others


# --------------------------------------------------------------------------------------- collate_pack


def test_a_pack_is_padded_to_its_size_with_a_sequence_of_its_own():
    batch = collate(TWO, 8)
    assert listed(batch, "input_ids", "labels", "position_ids", "padding_mask") == [
        [5, 6, 7, 8, 9, PAD, PAD, PAD],
        [6, 7, PAD, 9, PAD, PAD, PAD, PAD],  # the last token of a conversation predicts nothing
        [0, 1, 2, 0, 1, 0, 1, 2],
        [False] * 5 + [True] * 3,
    ]
    assert batch["loss_mask"].tolist() == [[[1, 1, 0, 1, 0, 0, 0, 0]]]
    sequences = batch["packed_seq_params"]
    assert sequences.seq_idx.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]] and ends(batch) == [3, 5, 8]
    assert sequences.qkv_format == "thd" and sequences.cu_seqlens_q.dtype is torch.int32


def test_each_conversation_is_padded_to_a_multiple():
    batch = collate(TWO, 12, depths=1, multiple=4)
    assert listed(batch, "input_ids", "labels", "position_ids", "padding_mask") == [
        [5, 6, 7, PAD, 8, 9, PAD, PAD, PAD, PAD, PAD, PAD],
        [6, 7, PAD, PAD, 9, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
        [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3],
        [False] * 3 + [True] + [False] * 2 + [True] * 6,
    ]
    assert batch["loss_mask"][:, 0].tolist() == [[1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], [1] + [0] * 11]
    assert ends(batch) == [4, 8, 12]
    assert batch["report"].tokens == 5


def test_a_full_pack_has_no_padding():
    batch = collate(TWO, 5)
    assert listed(batch, "labels", "position_ids") == [[6, 7, PAD, 9, PAD], [0, 1, 2, 0, 1]]
    assert not batch["padding_mask"].any()
    assert ends(batch) == [3, 5]


@pytest.mark.parametrize(
    ("lengths", "pack_size", "number", "longest"),
    [
        ([2, 3], 16, 8, 16),  # at least 8, and no more tokens than there are
        ([1] * 8, 16, 16, 16),  # the padding is the ninth
        ([600, 300], 4096, 8, 4096),  # as is the longest
        ([600, 300], 1200, 8, 1024),
        ([40] * 30, 1200, 32, 512),  # of shorter sequences kernels are not recorded
        ([1023, 1024, 1], 2048, 8, 1024),
    ],
)
def test_sizes_that_the_host_sees_are_rounded_up(
    lengths: list[int], pack_size: int, number: int, longest: int
):
    """What is added to the sequences is empty, at the end of the pack."""
    sequences = collate(pack(*([(3, 1)] * n for n in lengths)), pack_size)["packed_seq_params"]
    found = sequences.cu_seqlens_q.diff().tolist()
    padding = [pack_size - sum(lengths)] if sum(lengths) < pack_size else []
    assert found == [*lengths, *padding] + [0] * (number - len(lengths) - len(padding))
    assert sequences.max_seqlen_q == sequences.max_seqlen_kv == longest


def test_what_is_trained_is_what_the_assistant_said():
    batch = collate(TWO, 8)
    labels, mask = batch["labels"][0], batch["loss_mask"][0, 0].bool()
    assert labels[mask].tolist() == [6, 7, 9]


def test_sequence_parallel_ranks_get_their_part_of_the_padding_mask(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 1)
    batch = collate(TWO, 8)
    assert batch["padding_mask"].tolist() == [[False, True, True, True]]
    assert batch["input_ids"].shape == (1, 8)  # the embedding takes all of it


def test_context_parallel_ranks_get_two_chunks_of_each_conversation(monkeypatch: pytest.MonkeyPatch):
    """Rank 0 has the first and the last of 4 chunks, rank 1 those between."""
    four = pack([(i, 1) for i in range(1, 9)], [(i, 1) for i in range(11, 14)])
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        parts.append(collate(four, 16, multiple=4))
    assert listed(parts[0], "input_ids", "labels") == [
        [1, 2, 7, 8, 11, PAD, PAD, PAD],
        [2, 3, 8, PAD, 12, PAD, PAD, PAD],
    ]
    assert listed(parts[1], "input_ids", "labels") == [
        [3, 4, 5, 6, 12, 13, PAD, PAD],
        [4, 5, 6, 7, 13, PAD, PAD, PAD],
    ]
    assert [part["report"].tokens for part in parts] == [5, 6]
    assert ends(parts[0]) == [8, 12, 16]  # of the whole pack
    losses = torch.ones(1, 8)
    first, second = (part["report"].sums(losses) for part in parts)
    total = {name: (first + second)[name].tolist() for name in Sums.NAMES}
    assert total == {
        "loss": [9],
        "trained_tokens": [9],
        "sample_loss": [2],
        "conversations": [2],
        "tokens": [11],
        "packs": [1],
    }


def test_a_pack_longer_than_its_footer_says_is_our_mistake():
    with pytest.raises(AssertionError, match="a pack of 5 tokens where the footer says 4"):
        collate(TWO, 4)


def test_weights_of_each_depth_end_with_the_conversation():
    three = pack([(1, 0), (2, 1), (3, 1)], [(4, 0), (5, 0), (6, 1), (7, 1)], [(8, 0), (9, 0)])
    weights, totals = loss_weights(three, 2, "token")
    assert weights.tolist() == [
        [1, 1, 0, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0],
    ]
    assert totals.tolist() == [4, 3, 1]
    weights, totals = loss_weights(three, 2, "sample")
    assert weights.tolist() == [
        [0.5, 0.5, 0, 0, 0.5, 0.5, 0, 0, 0],
        [1, 0, 0, 0.5, 0.5, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0],
    ]
    assert totals.tolist() == [2, 2, 1]  # nothing is trained of the third


def test_a_pack_may_be_shorter_than_the_depths_look_ahead():
    """Three depths predict up to four tokens ahead, in a pack of two."""
    weights, totals = loss_weights(pack([(1, 0), (2, 1)]), 3, "token")
    assert weights.tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
    assert totals.tolist() == [1, 0, 0, 0]


# ------------------------------------------------------------------------------------------------- SFT


@pytest.fixture
def sft(packed_blend, tokenizer_dir: Path, sft_settings):
    """Batches over two sources of 6 and 3 packs, each of one token that says which, weighed 1 to 1."""
    info = tokenizer_info(tokenizer_dir)
    sources = {
        name: [[[(1, 0), (first + i, 1)]] for i in range(count)]
        for name, first, count in (("a", 100, 6), ("b", 200, 3))
    }
    blend = packed_blend(train=sources, valid={"b": sources["b"][:1], "a": sources["a"][:1]})

    def batches(**keys) -> SftBatches:
        return SftBatches.load(blend, sft_settings(**keys)[0], info, eval_samples=4)

    return batches


def seen(batches: SftBatches, first: int, count: int) -> list[int]:
    return [int(b["input_ids"][0, 1]) for b in batches.micro_batches("train", first, count)]


def test_packs_come_by_weight_and_each_once_an_epoch(sft):
    """Half of the packs are of `b`, which has half as many: two epochs of it in one of `a`."""
    packs = seen(sft(), 0, 12)
    assert sorted(packs) == sorted([*range(100, 106), *range(200, 203), *range(200, 203)])
    assert [sum(p < 200 for p in packs[:n]) for n in range(0, 13, 2)] == list(range(7))
    assert sorted(p for p in packs if p >= 200)[:3] == [200, 200, 201]


def test_what_is_wanted_and_what_comes_of_it_is_said(sft, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    batches = sft()
    assert batches.wanted() == {"a": (0.5, 6), "b": (0.5, 3)}
    assert "to train on" not in caplog.text  # a merge of adapters trains nothing
    caplog.clear()
    batches.report(4)
    of_half = "8 of 16 packs to train on (50.00 %, wanted 50.00 %)"
    assert [record.getMessage() for record in caplog.records] == [
        f"sft: source a: {of_half}, 1.33 epochs of its 6",
        f"sft: source b: {of_half}, 2.67 epochs of its 3",
    ]


def test_sft_sees_the_same_packs_after_a_restart(sft):
    """In the middle of an epoch, too."""
    packs = seen(sft(), 0, 16)
    assert seen(sft(), 4, 12) == packs[4:]
    assert seen(sft(seed=5), 0, 16) != packs


def test_metrics_are_of_the_source_of_a_pack(sft):
    """The two sources of the held-out split come in another order than those that are trained."""
    batches = sft()
    for batch in batches.micro_batches("valid", 0, 4):
        expected = "a" if int(batch["input_ids"][0, 1]) < 200 else "b"
        report = batch["report"]
        source = int(report.source)
        assert batches.sources[source] == expected and report.num_sources == 2
        sums = report.sums(torch.full((1, 16), 2.5))
        assert sums.means_of(source) == {
            "loss": 2.5,
            "sample_loss": 2.5,
            "trained_tokens": 1,
            "conversations": 1,
            "tokens": 2,
            "packs": 1,
        }
        assert not sums.values[1 - source].any()


def test_a_source_that_is_held_out_is_validated_by_its_name_and_not_wanted(
    packed_blend, tokenizer_dir: Path, sft_settings, caplog: pytest.LogCaptureFixture
):
    packs = {name: [[[(1, 0), (number, 1)]]] for name, number in (("a", 100), ("b", 200))}
    blend = packed_blend(train={"a": packs["a"]}, valid=packs)
    batches = SftBatches.load(blend, sft_settings()[0], tokenizer_info(tokenizer_dir), eval_samples=4)
    assert (batches.wanted(), batches.sources) == ({"a": (1.0, 1)}, ("a", "b"))
    found = [
        (int(batch["input_ids"][0, 1]), batches.sources[int(batch["report"].source)])
        for batch in batches.micro_batches("valid", 0, 4)
    ]
    assert sorted({*found}) == [(100, "a"), (200, "b")]
    assert set(seen(batches, 0, 4)) == {100}
    caplog.set_level("INFO")
    batches.report(4)
    assert "source a: 16 of 16 packs" in caplog.text and "source b" not in caplog.text


def test_weights_are_of_the_whole_step(sft, monkeypatch: pytest.MonkeyPatch):
    """Each pack has 2 tokens and trains 1: in a step of 4 a trained token counts 8 tokens / 4."""
    for batch in sft().micro_batches("train", 0, 4):
        assert batch["loss_mask"][0, 0].tolist() == [2.0] + [0.0] * 15
        assert not batch["loss_mask"][1].any()  # nothing two tokens further on


def test_a_split_without_packs_is_absent(sft):
    assert [sft().has(split) for split in ("train", "valid", "test")] == [True, True, False]


def test_packs_of_another_template_than_their_blend_says_are_refused(sft, tmp_path: Path):
    blend = tmp_path / "blend.json"
    blend.write_text(blend.read_text().replace('"template_sha256": "t"', '"template_sha256": "u"'))
    with pytest.raises(UserError, match="was made with template_sha256 t, and u is wanted"):
        sft()


def test_packs_without_room_for_padding_are_refused(sft, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: 2)
    with pytest.raises(UserError) as error:
        sft()
    assert str(error.value).endswith(
        "blend.json: the packs have room for conversations padded to a multiple of 1, and "
        "context_parallel_size 2 needs one of 4; set sft_data.padding_multiple to 4 and run the workflow "
        "again to pack anew"
    )


def test_validation_sees_each_source(packed_blend, tokenizer_dir, sft_settings):
    """By weight all of 4 packs would be of `a`; the last one is of `b` instead."""
    packs = {name: [[[(1, 0), (first + i, 1)]] for i in range(5)] for name, first in (("a", 100), ("b", 200))}
    blend = packed_blend(train=packs, valid=packs)
    value = json.loads(blend.read_text())
    for split in ("train", "valid"):
        for source, weight in zip(value["splits"][split], (0.99, 0.01), strict=True):
            source["weight"] = weight
    blend.write_text(json.dumps(value))
    batches = SftBatches.load(blend, sft_settings()[0], tokenizer_info(tokenizer_dir), eval_samples=4)
    seen = [int(b["input_ids"][0, 1]) for b in batches.micro_batches("valid", 0, 4)]
    assert [s // 100 for s in seen] == [1, 1, 1, 2] and len(set(seen)) == 4


def test_a_source_that_validation_does_not_see_is_named(packed_blend, tokenizer_dir, sft_settings, caplog):
    packs = [[[(1, 0), (5, 1)]]]
    blend = packed_blend(train={"a": packs, "b": packs}, valid={"a": packs, "b": packs})
    SftBatches.load(blend, sft_settings()[0], tokenizer_info(tokenizer_dir), eval_samples=1).report(1)
    said = "sft: validation has no pack of b: raise eval_samples (now 1) to the number of sources"
    assert said in caplog.text

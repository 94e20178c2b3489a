from __future__ import annotations

from pathlib import Path

from snaketron.data import arrow
from snaketron.data.chats import packs
from snaketron.log import UserError

import numpy as np
import pyarrow.parquet as pq
import pytest

MADE_WITH = {"tokenizer_sha256": "t", "template_sha256": "c", "pack_size": 8, "algorithm": "concatenative"}


def conversation(*tokens: int, trained: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, of which the last `trained` ones are output of the assistant."""
    mask = np.zeros(len(tokens), dtype=np.uint8)
    mask[len(tokens) - trained :] = 1
    return np.array(tokens, dtype=np.int32), mask


def packs_of(count: int, first: int = 0) -> list[packs.Pack]:
    return [packs.join([conversation(i, i + 1, i + 2, trained=1)]) for i in range(first, first + count)]


def as_lists(pack: packs.Pack) -> list[list[int]]:
    return [values.tolist() for values in pack]


def test_the_mask_is_aligned_with_the_labels():
    pack = packs.join([conversation(1, 2, 3, 4, trained=2), conversation(5, 6, 7, trained=3)])
    assert as_lists(pack) == [
        [1, 2, 3, 4, 5, 6, 7],
        [0, 1, 1, 0, 1, 1, 0],  # 3 and 4 are predicted at 2 and 3; nothing predicts 5, or comes after 4 and 7
        [0, 4],
    ]


def test_the_file_has_the_columns_of_megatron_bridge_and_a_footer(tmp_path):
    packs.write(tmp_path / "a.parquet", packs_of(3), MADE_WITH)
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert schema.names == ["input_ids", "loss_mask", "seq_start_id"]
    assert [str(field.type.value_type) for field in schema] == ["int32", "uint8", "int32"]
    assert pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0).compression == "ZSTD"
    assert arrow.read_footer(tmp_path / "a.parquet", packs.SCHEMA.names)[1] == MADE_WITH
    assert pq.read_table(tmp_path / "a.parquet").to_pylist()[1] == {
        "input_ids": [1, 2, 3],
        "loss_mask": [0, 1, 0],
        "seq_start_id": [0],
    }


def test_a_split_without_packs_is_a_valid_file(tmp_path):
    packs.write(tmp_path / "a.parquet", [], MADE_WITH)
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 0
    assert len(packs.PackedDataset([tmp_path / "a.parquet"], MADE_WITH)) == 0


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """25, 0 and 7 packs of 3 tokens, two packs a row group: 13 + 0 + 4 row groups."""
    monkeypatch.setattr(packs, "ROW_GROUP_TOKENS", 6)
    paths = [tmp_path / name for name in ("a.parquet", "b.parquet", "c.parquet")]
    for path, count, first in zip(paths, (25, 0, 7), (0, 0, 25), strict=True):
        packs.write(path, packs_of(count, first), MADE_WITH)
    return paths


def test_row_groups_are_small(files):
    assert [pq.read_metadata(path).num_row_groups for path in files] == [13, 0, 4]


def test_a_pack_larger_than_a_row_group_has_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "ROW_GROUP_TOKENS", 2)
    packs.write(tmp_path / "a.parquet", packs_of(3), MADE_WITH)
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 3


def test_packs_are_found_across_files(files):
    dataset = packs.PackedDataset(files, MADE_WITH)
    assert len(dataset) == 32
    assert [dataset[i].input_ids.tolist() for i in range(32)] == [[i, i + 1, i + 2] for i in range(32)]
    assert [values.dtype for values in dataset[31]] == [np.int32, np.uint8, np.int32]
    for index in (-1, 32):
        with pytest.raises(IndexError, match="of 32"):
            dataset[index]


def test_a_shuffled_pass_decodes_every_row_group_once_and_the_next_epoch_none(files):
    dataset = packs.PackedDataset(files, MADE_WITH)
    for epoch in range(2):
        for index in np.random.default_rng(epoch).permutation(32):
            assert dataset[index].input_ids[0] == index
        assert dataset.row_groups_decoded == 17


def test_the_cache_stays_below_its_limit(files):
    dataset = packs.PackedDataset(files, MADE_WITH, cache_bytes=300)
    for index in np.random.default_rng(0).permutation(32):
        assert dataset[index].input_ids[0] == index
        groups = dataset._groups
        assert groups.used == sum(group.num_bytes for group in groups._values.values()) <= 300
    assert dataset.row_groups_decoded > 17


def test_footers_beyond_the_limit_are_read_again(files, monkeypatch):
    monkeypatch.setattr(packs, "FOOTER_ROW_GROUPS", 5)
    dataset = packs.PackedDataset(files, MADE_WITH, cache_bytes=1)
    for index in (0, 31, 24, 25):
        assert dataset[index].input_ids[0] == index
        assert len(dataset._footers._values) == 1  # of 13 or of 4 row groups


def test_a_row_group_larger_than_the_cache_is_still_read(files):
    dataset = packs.PackedDataset(files, MADE_WITH, cache_bytes=1)
    assert [dataset[i].input_ids[0] for i in (0, 1, 5, 0)] == [0, 1, 5, 0]
    assert dataset.row_groups_decoded == 3


def test_the_packs_are_read_only(files):
    with pytest.raises(ValueError, match="read-only"):
        packs.PackedDataset(files, MADE_WITH)[0].input_ids[0] = 1


@pytest.mark.parametrize("name", ["tokenizer_sha256", "template_sha256", "pack_size"])
def test_packs_made_for_something_else_are_refused(files, name):
    with pytest.raises(
        UserError, match=rf"a\.parquet: was made with {name} {MADE_WITH[name]}, and other is wanted"
    ):
        packs.PackedDataset(files, {**MADE_WITH, name: "other"})


def test_a_damaged_row_group_is_named(files):
    dataset = packs.PackedDataset(files, MADE_WITH)
    damaged = bytearray(files[0].read_bytes())
    damaged[4:200] = bytes(196)
    files[0].write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.parquet: damaged or not Parquet"):
        dataset[0]

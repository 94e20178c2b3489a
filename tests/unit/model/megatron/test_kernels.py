"""What the kernels of a GPU are told, which a CPU makes."""

import pytest

pytest.importorskip("triton")
from snaketron.model.megatron.kernels import ADAM_BLOCK, blocks


def test_adam_goes_through_each_tensor_in_blocks():
    """10,000 numbers from byte 1600 on, and 3 from byte 32 on."""
    [*whole, last, small] = blocks(
        [(1600, 160_000, 320_000, 480_000, 640_000, 10_000), (32, 64, 96, 128, 160, 3)], ADAM_BLOCK
    ).tolist()
    assert [row[0] for row in whole] == [1600, 1600 + 2 * ADAM_BLOCK]
    assert [row[-1] for row in whole] == [ADAM_BLOCK, ADAM_BLOCK]
    assert last == [n + 4 * ADAM_BLOCK for n in (1600, 160_000, 320_000, 480_000, 640_000)] + [1808]
    assert small == [32, 64, 96, 128, 160, 3]


def test_adam_takes_smaller_blocks_where_a_tensor_begins_at_no_multiple_of_16_bytes():
    table = blocks([(1602, 1600, 3200, 4800, 6400, ADAM_BLOCK)], ADAM_BLOCK)
    assert table[:, -1].tolist() == [ADAM_BLOCK // 2] * 2


def test_no_tensors_make_an_empty_table():
    assert len(blocks([], ADAM_BLOCK)) == 0

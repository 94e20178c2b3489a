"""The optimizer's state in a checkpoint: each number where it belongs, in any layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron.optimizer_state import Place, _held, _owners, joined, split
from tests.conftest import run_module

import pytest
import torch


def test_parameters_are_written_by_a_rank_that_holds_a_part_and_evenly():
    """Two ranks with 10 numbers each of a bucket: a has 0 to 7, b 7 to 12 and c 12 to 20."""
    a, b, c = (torch.empty(n) for n in (7, 5, 8))
    bucket = [Place(a, 0, 7, 10), Place(b, 7, 12, 10), Place(c, 12, 20, 10)]
    assert [list(place.holders) for place in bucket] == [[0], [0, 1], [1]]
    assert bucket[1].part(0) == slice(0, 3) and bucket[1].part(1) == slice(3, 5)
    assert bucket[2].part(1) == slice(0, 8)
    owners = _owners([bucket])  # b goes to the rank that has 7, not to that which has 8
    assert (owners[a], owners[b], owners[c]) == (0, 0, 1)


def train(directory: Path, name: str, processes: int = 1, load: str | None = None, **parallel: int) -> None:
    """A process, or two, of `saved_state`."""
    keys = {"name": str(directory / name), "load": load and str(directory / load), "parallel": parallel}
    done = run_module("tests.unit.train.saved_state", json.dumps(keys), processes=processes)
    assert "padded" not in done.output and "differs" not in done.output  # megatron-core's warnings


def state(directory: Path, name: str) -> dict[str, torch.Tensor]:
    """Main weights and moments of all parameters, put together from the ranks."""
    parts: dict[str, list] = {}
    for file in sorted(directory.glob(f"{name}_*.pt")):
        for parameter, (start, _, values) in torch.load(file).items():
            for key, value in values.items():
                parts.setdefault(f"{parameter} {key}", []).append((start, value))
    return {key: torch.cat([v for _, v in sorted(found, key=lambda p: p[0])]) for key, found in parts.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and len(first) > 300
    assert not [key for key in first if not torch.equal(first[key], second[key])]


def test_the_state_of_two_processes_is_that_of_one_with_a_bucket_for_each_parameter(tmp_path: Path):
    """And back. megatron-core's own reads it shifted by the padding of the buckets before."""
    train(tmp_path, "two", 2, data_parallel_size=2)
    train(tmp_path, "one", load="two")
    train(tmp_path, "back", 2, load="one", data_parallel_size=2)
    assert_same(state(tmp_path, "one"), state(tmp_path, "two"))
    assert_same(state(tmp_path, "back"), state(tmp_path, "two"))
    sizes = [file.stat().st_size for file in (tmp_path / "two/iter_0000002").glob("*.distcp")]
    assert len(sizes) == 2 and max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("kind", ["expert", "tensor"])
def test_parts_of_a_model_keep_their_state(tmp_path: Path, kind: str):
    parallel = {f"{kind}_model_parallel_size": 2, "data_parallel_size": 2 if kind == "expert" else 1}
    train(tmp_path, "first", 2, **parallel)
    train(tmp_path, "second", 2, load="first", **parallel)
    for rank in ("0", "1"):
        before, after = (torch.load(tmp_path / f"{name}_{rank}.pt") for name in ("first", "second"))
        assert before.keys() == after.keys()
        for name, (start, end, values) in before.items():
            assert after[name][:2] == (start, end)
            assert all(torch.equal(value, after[name][2][key]) for key, value in values.items())


def test_a_main_weight_is_a_rounded_weight_and_16_bits():
    """1 + 3/512 lies between the bf16 numbers 1 and 1 + 1/128; 0xC000 after the rounded one is -16384."""
    values = torch.tensor([1.0, 1 + 3 / 512, -1 - 1 / 512, 1 + 1 / 256])
    weights, remainders = split(values)
    assert weights.tolist() == [1.0, 1 + 1 / 128, -1.0, 1 + 1 / 128]
    assert remainders.tolist() == [0, -16384, 16384, -32768]
    drawn = torch.randn(1000, generator=torch.Generator().manual_seed(1)) ** 9
    assert torch.equal(joined(*split(drawn)), drawn)
    assert torch.equal(joined(weights, remainders), values)


def test_the_main_weight_of_a_weight_in_fp32_is_that_weight():
    """With moments in bf16 Transformer Engine's AdamW has the weight of the first step beside it."""
    weight, first = torch.arange(3.0), torch.zeros(3)
    moments = {"exp_avg": torch.ones(3).bfloat16(), "master_param": first}
    adam = SimpleNamespace(param_groups=[{"params": [weight]}], state={weight: moments})
    optimizer: Any = SimpleNamespace(
        optimizer=adam,
        model_param_group_index_map={weight: (0, 0)},
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=True),
    )
    assert _held(optimizer, weight, "param").whole().tolist() == [0, 1, 2]
    _held(optimizer, weight, "param").take(1, torch.tensor([7.0, 8.0]))
    assert weight.tolist() == [0, 7, 8] and not first.any()
    assert _held(optimizer, weight, "exp_avg").whole().tolist() == [1, 1, 1]

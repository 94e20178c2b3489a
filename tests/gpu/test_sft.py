"""Tuning on packs: the CPU's losses on a GPU, and one GPU's losses on two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import packed
from tests.gpu.test_training import LAYOUT_TOLERANCE, TOLERANCE, train
from tests.gpu.worker import write_packs

import pytest
import torch

# Two steps by token, the others by conversation.
RUN = {"switch_loss_average_after": 2}
LAYOUTS = {
    "cp": {"context_parallel_size": 2},
    "dp": {"data_parallel_size": 2},
    "tp": {"tensor_model_parallel_size": 2},
}


def test_a_rank_holds_the_positions_that_transformer_engine_says():
    import transformer_engine_torch as tex

    ends = torch.tensor([0, 8, 24, 36, 64], dtype=torch.int32, device="cuda")
    for rank in (0, 1):
        theirs = tex.thd_get_partitioned_indices(ends, 64, 2, rank)
        assert packed.partition(ends, 64, 2, rank).tolist() == theirs.tolist()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """A tuning continued from the checkpoint of a CPU after one step: there, on a GPU and on two."""
    root = tmp_path_factory.mktemp("sft")
    common = {"blend": str(write_packs(root / "packs")), "model": {"precision": "bf16"}}
    train(root / "start", gpus=0, steps=1, save_at=[1], run=RUN, **common)
    ways: dict[str, tuple[int, dict]] = {"cpu": (0, {}), "one": (1, {})}
    ways |= {name: (2, sizes) for name, sizes in LAYOUTS.items()}
    with ThreadPoolExecutor(len(ways)) as pool:
        futures = {}
        for name, (gpus, sizes) in ways.items():
            shutil.copytree(root / "start", root / name)
            run = RUN | {"parallel": sizes}
            futures[name] = pool.submit(train, root / name, gpus=gpus, run=run, **common)
        yield futures


def compare(found: Any, expected: Any, tolerance: tuple[float, float], name: str) -> None:
    for key in ("losses", "mtp", "norms"):
        worst = max(
            abs(a - b) / (1 if key != "norms" else b) for a, b in zip(found[key], expected[key], strict=True)
        )
        print(f"{name}: {key} differ by {worst:.1e}")
        assert worst < tolerance[key == "norms"]


def test_packs_have_the_losses_of_the_cpu(runs: dict[str, Future]):
    cpu, gpu = runs["cpu"].result(), runs["one"].result()
    assert gpu["resumed"]
    compare(gpu, cpu, TOLERANCE["bf16"], "one GPU against the CPU")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_have_the_losses_of_one_on_packs(runs: dict[str, Future], layout: str):
    compare(runs[layout].result(), runs["one"].result(), LAYOUT_TOLERANCE["bf16"], layout)


@pytest.mark.parametrize("precision", ["fp8_current", "fp8_delayed", "fp8_blockwise"])
def test_packs_may_be_tuned_on_in_fp8(tmp_path: Path, precision: str):
    """Padding is rounded with all else; the losses are the same where experts are computed again."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("of a Hopper GPU")
    blend = str(write_packs(tmp_path / "packs"))

    def tune(way: tuple[str, list[str]]) -> Any:
        name, recompute = way
        model = {"mamba_num_heads": 16, "mamba_head_dim": 16, "precision": name}
        run = RUN | {"recompute": recompute}
        return train(tmp_path / f"{name}{len(recompute)}", gpus=1, blend=blend, model=model, run=run)

    with ThreadPoolExecutor(3) as pool:
        bf16, fp8, again = pool.map(tune, [("bf16", []), (precision, []), (precision, ["moe"])])
    compare(fp8, bf16, (0.05, 0.3), precision)
    compare(again, fp8, LAYOUT_TOLERANCE["bf16"], f"{precision}, recomputed")

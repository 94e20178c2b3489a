"""Tuning on packs: the CPU's losses on a GPU, and one GPU's losses on two."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import packed
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
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The blend, and a directory with the checkpoint of a CPU after one step on it."""
    root = tmp_path_factory.mktemp("sft")
    blend = write_packs(root / "packs")
    start = root / "start"
    train(start, gpus=0, steps=1, save_at=[1], blend=str(blend), run=RUN, model={"precision": "bf16"})
    return blend, start


def go_on(
    begun: tuple[Path, Path], tmp_path: Path, name: str, gpus: int, parallel: dict | None = None
) -> Any:
    blend, start = begun
    shutil.copytree(start, tmp_path / name)
    run = RUN | {"parallel": parallel or {}}
    found = train(tmp_path / name, gpus=gpus, blend=str(blend), run=run, model={"precision": "bf16"})
    assert found["resumed"]
    return found


def compare(found: Any, expected: Any, tolerance: tuple[float, float], name: str) -> None:
    for key in ("losses", "mtp", "norms"):
        worst = max(
            abs(a - b) / (1 if key != "norms" else b) for a, b in zip(found[key], expected[key], strict=True)
        )
        print(f"{name}: {key} differ by {worst:.1e}")
        assert worst < tolerance[key == "norms"]


def test_packs_have_the_losses_of_the_cpu(begun, tmp_path: Path):
    cpu, gpu = (go_on(begun, tmp_path, f"gpus{n}", n) for n in (0, 1))
    compare(gpu, cpu, TOLERANCE["bf16"], "one GPU against the CPU")


@pytest.mark.gpus(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_have_the_losses_of_one_on_packs(begun, tmp_path: Path, layout: str):
    one = go_on(begun, tmp_path, "one", 1)
    two = go_on(begun, tmp_path, layout, 2, LAYOUTS[layout])
    compare(two, one, LAYOUT_TOLERANCE["bf16"], layout)

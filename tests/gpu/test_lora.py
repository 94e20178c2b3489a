"""LoRA on GPUs, on Transformer Engine's layers and our experts, against the CPU and against one GPU.

In fp32 the experts are Transformer Engine's grouped layers with adapters in a hook, in bf16 ours.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.gpu.test_training import LAYOUT_TOLERANCE, LAYOUTS, PRECISIONS, TOLERANCE, check, difference, train

import pytest
import torch

LORA = {"rank": 8, "target_modules": ["linear_*", "*_proj", "router"]}
# Of the validation loss (nats) before and after merging; in bf16 the merged weights have 8 bits.
MERGED = {"fp32": 1e-3, "bf16": 1e-2}


@pytest.fixture(scope="module", params=PRECISIONS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base and the first step of its adapters from a CPU, which the CPU and a GPU continue."""
    root: Path = tmp_path_factory.mktemp(f"lora_{request.param}")
    model = {"precision": request.param}
    train(root / "base", gpus=0, model=model, steps=2, save_at=[2])
    common = {"model": model, "lora": LORA, "base": str(root / "base")}
    found = {"cpu": train(root / "cpu", gpus=0, save_at=[1], **common)}
    for name in ("one", *LAYOUTS):
        shutil.copytree(root / "cpu", root / name)
    found["one"] = train(root / "one", gpus=1, save_at=[3], **common)
    return {"precision": request.param, "root": root, "common": common, **found}


def test_adapters_of_a_cpu_continue_on_a_gpu_with_the_same_losses(runs: dict[str, Any]):
    cpu, gpu = runs["cpu"], runs["one"]
    assert gpu["resumed"] and len(gpu["losses"]) == len(cpu["losses"]) - 1
    check(runs["precision"], difference(gpu, cpu), TOLERANCE[runs["precision"]])
    assert cpu["tuned"] < cpu["valid"] - 0.02  # something was learnt


def test_adapters_of_a_gpu_continue_on_a_cpu(runs: dict[str, Any]):
    cpu = train(runs["root"] / "one", gpus=0, **runs["common"])
    assert cpu["resumed"] and len(cpu["losses"]) == len(runs["one"]["losses"]) - 2
    check(runs["precision"], difference(cpu, runs["one"]), TOLERANCE[runs["precision"]])


def test_merging_on_a_gpu_keeps_the_loss(runs: dict[str, Any]):
    gpu = runs["one"]
    print(f"{runs['precision']}: with adapters {gpu['tuned']:.6f}, merged {gpu['merged']:.6f}")
    assert abs(gpu["merged"] - gpu["tuned"]) < MERGED[runs["precision"]]


@pytest.mark.gpus(2)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "cp"])
def test_two_gpus_give_the_adapters_of_one(runs: dict[str, Any], layout: str):
    root, precision = runs["root"], runs["precision"]
    two = train(root / layout, gpus=2, run={"parallel": LAYOUTS[layout]}, **runs["common"])
    check(f"{layout} {precision}", difference(two, runs["one"]), LAYOUT_TOLERANCE[precision])
    assert abs(two["merged"] - two["tuned"]) < MERGED[precision]


def test_a_frozen_base_may_be_in_fp8(runs: dict[str, Any], tmp_path: Path):
    """fp8 products of a frozen base, with adapters in bf16 beside them: the losses of bf16."""
    if runs["precision"] != "bf16" or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("of a Hopper GPU, once")
    model = {"mamba_num_heads": 16, "mamba_head_dim": 16}
    found = {}
    train(tmp_path / "base", gpus=1, model=model | {"precision": "bf16"}, steps=2, save_at=[2])
    for precision in ("bf16", "fp8_current"):
        found[precision] = train(
            tmp_path / precision,
            gpus=1,
            model=model | {"precision": precision},
            lora=LORA,
            base=str(tmp_path / "base"),
        )
    check("fp8_current", difference(found["fp8_current"], found["bf16"]), (0.05, 0.3))

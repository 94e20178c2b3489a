"""LoRA on GPUs, on Transformer Engine's layers and Snaketron's experts, against the CPU and against one GPU.

In fp32 the experts are Transformer Engine's grouped layers with adapters in a hook, in bf16 Snaketron's.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.gpu.test_training import (
    LAYOUT_TOLERANCE,
    LAYOUTS,
    PRECISIONS,
    TOLERANCE,
    check,
    difference,
    train,
)

import pytest
import torch

LORA = {"rank": 8, "target_modules": ["linear_*", "*_proj", "router"]}
# Largest change of the validation loss by merging, in nats; in bf16 the merged weights have 8 bits.
MERGED = {"fp32": 1e-3, "bf16": 1e-2}
TWO = [layout for layout in LAYOUTS if layout != "cp"]


class Runs:
    """A base and the first step of its adapters from a CPU, in each precision, and what continues it.

    Started at once, as those of `test_training`.
    """

    def __init__(self, root: Path, chosen: str) -> None:
        self.root, self.chosen = root, chosen  # names of tests
        self.pool = ThreadPoolExecutor(max(4, (os.cpu_count() or 4) // 4))
        self.futures: dict[tuple[str, str], Future] = {}
        for precision in PRECISIONS:
            self.futures[precision, "cpu"] = self.pool.submit(self._cpu, precision)

    def common(self, precision: str) -> dict[str, Any]:
        base = str(self.root / precision / "base")
        return {"model": {"precision": precision}, "lora": LORA, "base": base}

    def _cpu(self, precision: str) -> Any:
        root, common = self.root / precision, self.common(precision)
        train(root / "base", gpus=0, model=common["model"], steps=2, save_at=[2])
        cpu = train(root / "cpu", gpus=0, save_at=[1], **common)
        layouts = [name for name in TWO if f"of_one[{name}-{precision}]" in self.chosen]
        for name in ("one", *layouts):
            shutil.copytree(root / "cpu", root / name)
            self.futures[precision, name] = self.pool.submit(
                train,
                root / name,
                gpus=1 if name == "one" else 2,
                run={"parallel": {} if name == "one" else LAYOUTS[name]},
                cluster={"gpus_per_node": 1} if name == "dp_nodes" else {},
                save_at=[3] if name == "one" else [],
                **common,
            )
        return cpu

    def __getitem__(self, key: tuple[str, str]) -> Any:
        self.futures[key[0], "cpu"].result()  # which starts the others
        return self.futures[key].result()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    chosen = " ".join(item.name for item in request.session.items if item.path == request.path)
    started = Runs(tmp_path_factory.mktemp("lora"), chosen)
    yield started
    started.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_of_a_cpu_continue_on_a_gpu_with_the_same_losses(runs: Runs, precision: str):
    cpu, gpu = runs[precision, "cpu"], runs[precision, "one"]
    assert gpu["resumed"] and len(gpu["losses"]) == len(cpu["losses"]) - 1
    check(precision, difference(gpu, cpu), TOLERANCE[precision])
    assert cpu["tuned"] < cpu["valid"] - 0.02  # something was learnt


@pytest.mark.parametrize("precision", PRECISIONS)
def test_adapters_of_a_gpu_continue_on_a_cpu(runs: Runs, precision: str):
    gpu = runs[precision, "one"]
    cpu = train(runs.root / precision / "one", gpus=0, **runs.common(precision))
    assert cpu["resumed"] and len(cpu["losses"]) == len(gpu["losses"]) - 2
    check(precision, difference(cpu, gpu), TOLERANCE[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_merging_on_a_gpu_keeps_the_loss(runs: Runs, precision: str):
    gpu = runs[precision, "one"]
    print(f"{precision}: with adapters {gpu['tuned']:.6f}, merged {gpu['merged']:.6f}")
    assert abs(gpu["merged"] - gpu["tuned"]) < MERGED[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", TWO)
def test_two_gpus_give_the_adapters_of_one(runs: Runs, precision: str, layout: str):
    two = runs[precision, layout]
    check(f"{layout} {precision}", difference(two, runs[precision, "one"]), LAYOUT_TOLERANCE[precision])
    assert abs(two["merged"] - two["tuned"]) < MERGED[precision]


FP8_MODEL = {"mamba_num_heads": 32, "mamba_head_dim": 16}


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """What adapters of a base are trained with, but for its precision; and what they are in bf16."""
    root = tmp_path_factory.mktemp("fp8")
    train(root / "base", gpus=1, model=FP8_MODEL | {"precision": "bf16"}, steps=2, save_at=[2])
    keys = {"lora": LORA, "base": str(root / "base")}
    return keys, train(root / "bf16", gpus=1, model=FP8_MODEL | {"precision": "bf16"}, **keys)


@pytest.mark.parametrize(
    ("precision", "run"),
    [
        *((precision, {}) for precision in ("fp8_current", "fp8_delayed", "fp8_blockwise")),
        ("fp8_current", {"recompute": ["layer"]}),
        *(("fp8_current", {"parallel": LAYOUTS[layout]}) for layout in ("tp", "ep", "pp")),
        ("fp8_delayed", {"parallel": LAYOUTS["ep"]}),
    ],
    ids=["current", "delayed", "blockwise", "recomputed", "tp", "ep", "pp", "delayed_ep"],
)
def test_a_frozen_base_may_be_in_fp8(
    in_bf16: tuple[dict[str, Any], Any], tmp_path: Path, precision: str, run: dict[str, Any]
):
    """fp8 products of a frozen base, with adapters in bf16 beside them: the losses of bf16."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("of a Hopper GPU")
    keys, bf16 = in_bf16
    model = FP8_MODEL | {"precision": precision}
    fp8 = train(tmp_path / precision, gpus=2 if "parallel" in run else 1, model=model, run=run, **keys)
    check(precision, difference(fp8, bf16), (0.05, 0.3))
    assert abs(fp8["merged"] - fp8["tuned"]) < 0.05  # by weights that were rounded anew

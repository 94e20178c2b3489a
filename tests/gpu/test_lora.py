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


def test_a_frozen_base_may_be_in_fp8(tmp_path: Path):
    """fp8 products of a frozen base, with adapters in bf16 beside them: the losses of bf16."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("of a Hopper GPU")
    model = {"mamba_num_heads": 16, "mamba_head_dim": 16}
    train(tmp_path / "base", gpus=1, model=model | {"precision": "bf16"}, steps=2, save_at=[2])

    def tune(precision: str) -> Any:
        keys = {"model": model | {"precision": precision}, "lora": LORA, "base": str(tmp_path / "base")}
        return train(tmp_path / precision, gpus=1, **keys)

    with ThreadPoolExecutor(2) as pool:
        bf16, fp8 = pool.map(tune, ("bf16", "fp8_current"))
    check("fp8_current", difference(fp8, bf16), (0.05, 0.3))

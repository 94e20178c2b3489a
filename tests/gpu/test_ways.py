"""Layouts, recomputation and precisions of the optimizer together, and in fp8: the losses of one process.

What continues is the checkpoint of one GPU after a step.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tests.gpu.test_training import (
    ALLTOALL,
    BF16_STATE,
    LAYOUT_TOLERANCE,
    LAYOUTS,
    check,
    difference,
    train,
)

import pytest
import torch

# fp8 products want multiples of 16, in each of two tensor parallel processes too. Experts outside of a latent
# space may be computed beside that of all tokens (`moe_shared_expert_overlap`).
MODEL = {"mamba_num_heads": 32, "mamba_head_dim": 16, "moe_latent_size": None}
SHARED = {name: {"parallel": LAYOUTS[name]} for name in ("tp", "ep", "pp", "cp", "dp")} | {
    "alltoall": ALLTOALL
}
AGAIN: dict[str, Any] = {
    "layer": {"recompute": ["layer"]},
    "moe": {"recompute": ["moe"]},
    "parts": {"recompute": ["core_attn", "shared_experts"]},
}
IN_BF16: dict[str, Any] = {
    "overlap": {"moe_shared_expert_overlap": True},
    "overlap_ep": ALLTOALL | {"moe_shared_expert_overlap": True},
    "etp": {"parallel": {"expert_tensor_parallel_size": 2, "data_parallel_size": 2}},
    "tp_etp": {"parallel": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}},
    "moe_ep": AGAIN["moe"] | SHARED["ep"],
    "layer_pp": AGAIN["layer"] | SHARED["pp"],
}
STATE = {f"state_{name}": run | {"optimizer": BF16_STATE} for name, run in SHARED.items()}
FP8 = ("fp8_current", "fp8_delayed", "fp8_blockwise")
WAYS: dict[str, dict[str, Any]] = {
    "bf16": {"one": {}, **IN_BF16, "state": {"optimizer": BF16_STATE}, **STATE},
    **{precision: {"one": {}, **SHARED, **AGAIN} for precision in FP8},
}
del WAYS["fp8_delayed"]["layer"]  # refused with multi-token prediction
CELLS = [(precision, way) for precision, ways in WAYS.items() for way in ways if way not in ("one", "state")]
# In fp8 another layout rounds other numbers: one scale for the part of a tensor that a process has.
IN_FP8 = (0.02, 0.1)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict[tuple[str, str], Future]]:
    root = tmp_path_factory.mktemp("ways")
    names = " ".join(item.name for item in request.session.items)
    chosen = [cell for cell in CELLS if f"one_process[{cell[0]}-{cell[1]}]" in names]
    chosen += [(precision, "one") for precision in WAYS] + [("bf16", "state")]
    precisions = [p for p in WAYS if any(p == of and way not in ("one", "state") for of, way in chosen)]
    with ThreadPoolExecutor(12) as pool:

        def start(precision: str) -> None:
            train(root / precision, gpus=1, model=MODEL | {"precision": precision}, steps=1, save_at=[1])

        list(pool.map(start, precisions))
        futures = {}
        for precision, way in chosen:
            if precision in precisions:
                run, directory = WAYS[precision][way], root / f"{precision}_{way}"
                shutil.copytree(root / precision, directory)
                futures[precision, way] = pool.submit(
                    train,
                    directory,
                    gpus=2 if "parallel" in run else 1,
                    model=MODEL | {"precision": precision},
                    run=run,
                )
        yield futures


@pytest.mark.parametrize(("precision", "way"), CELLS)
def test_a_way_to_train_gives_the_losses_of_one_process(
    runs: dict[tuple[str, str], Future], precision: str, way: str
):
    if precision in FP8 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("of a Hopper GPU")
    one = "state" if way in STATE else "one"
    found = runs[precision, way].result()
    assert found["resumed"]
    limit = IN_FP8 if way in SHARED else LAYOUT_TOLERANCE["bf16"]
    check(f"{precision} {way}", difference(found, runs[precision, one].result()), limit)

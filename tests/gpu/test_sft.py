"""Tuning on packs: the CPU's losses on a GPU, one GPU's losses on two, and recorded kernels."""

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


PACK_SIZE = 1024  # of packs that are recorded: with 3 to 22 sequences, the longest up to 600 tokens or more
LORA = {"rank": 8, "target_modules": ["linear_*", "*_proj", "router"]}
RECORDED: dict[str, dict[str, Any]] = {
    "bf16": {},
    "mtp": {"model": {"mtp_hybrid_layer_pattern": "E*E", "mtp_num_layers": 2}},
    **{name: {"model": {"precision": name}} for name in ("fp8_current", "fp8_delayed")},
    "dp": {"run": {"parallel": LAYOUTS["dp"]}, "gpus": 2},
    "tp": {"run": {"parallel": LAYOUTS["tp"]}, "gpus": 2},
    "lora": {"lora": LORA},
    "lora_fp8": {"lora": LORA, "model": {"precision": "fp8_current"}},
    "lora_tp": {"lora": LORA, "run": {"parallel": LAYOUTS["tp"]}, "gpus": 2},
}


class Tunings:
    """The tunings of the tests that were chosen, recorded and not, started at once."""

    def __init__(self, root: Path, chosen: str) -> None:
        self.root, self.blend = root, str(write_packs(root / "packs", pack_size=PACK_SIZE))
        self.pool = ThreadPoolExecutor(8)
        self.futures = {
            (name, how): self.pool.submit(self._tune, name, how)
            for name in RECORDED
            if f"kernels_give[{name}]" in chosen
            for how in ("recorded", "launched")
        }

    def _tune(self, name: str, how: str) -> Any:
        about = {"gpus": 1, "model": {}, "run": {}} | RECORDED[name]
        about["model"] = {"precision": "bf16", "mamba_num_heads": 32, "mamba_head_dim": 16} | about["model"]
        about["run"] = RUN | about["run"] | ({"cuda_graphs": False} if how == "launched" else {})
        directory = self.root / f"{how}_{name}"
        if "lora" in about:
            about["base"] = str(directory / "base")
            train(Path(about["base"]), gpus=1, model=about["model"], steps=2, save_at=[2])
        if how == "recorded":  # a resumed training records anew, from its third step on
            train(directory, blend=self.blend, save_at=[4], **about | {"steps": 4})
        return train(directory, blend=self.blend, **about, steps=8, valid_at=[6] if how == "recorded" else [])


@pytest.fixture(scope="module")
def tunings(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Tunings]:
    chosen = " ".join(item.name for item in request.session.items if item.path == request.path)
    started = Tunings(tmp_path_factory.mktemp("recorded"), chosen)
    yield started
    started.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_packs_have_the_losses_that_started_kernels_give(tunings: Tunings, name: str):
    """Steps 5 to 8 of four packs, with validations between them. The first two are not recorded."""
    recorded, launched = (tunings.futures[name, how].result() for how in ("recorded", "launched"))
    assert (recorded["recorded"], launched["recorded"]) == ("micro-batches", "nothing")
    assert len(recorded["losses"]) == 4 and len(launched["losses"]) == 8
    launched |= {key: launched[key][4:] for key in ("losses", "mtp", "norms")}
    compare(recorded, launched, LAYOUT_TOLERANCE["bf16"], name)
    for key in ("valid_after", *(["tuned", "merged"] if name.startswith("lora") else [])):
        print(f"{name}: {key} differs by {abs(recorded[key] - launched[key]):.1e}")
        assert abs(recorded[key] - launched[key]) < LAYOUT_TOLERANCE["bf16"][0]

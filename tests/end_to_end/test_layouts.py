"""The same training under every way of sharing the model between two processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.conftest import Workspace
from tests.end_to_end.processes import run_until, saved, shell_lines

import pytest

# How far a loss of about 7 may be off, in nats, over 12 steps: sums in another order, and under context
# parallelism megatron-core's weight of the multi-token prediction loss, which counts each rank's tokens.
TOLERANCE = {"cp": 2e-3}
OTHERWISE = 1e-5

LAYOUTS = {
    "tp": "tensor_model_parallel_size: 2",  # with sequence parallelism
    "ep": "expert_model_parallel_size: 2, data_parallel_size: 2",
    "pp": "pipeline_model_parallel_size: 2",
    "cp": "context_parallel_size: 2",
    "dp": "data_parallel_size: 2",
}
TARGET = "ckpt/pretrain/broad"


def losses(checkpoint: Path) -> dict[str, list[float]]:
    """Training, validation and multi-token prediction losses, in order."""
    lines = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "valid_loss", "mtp_1_loss", "load_balancing_loss")
    return {key: [line[key] for line in lines if key in line] for key in keys}


def worst(found: dict[str, list[float]], expected: dict[str, list[float]]) -> dict[str, float]:
    return {key: max(abs(a - b) for a, b in zip(found[key], expected[key], strict=True)) for key in expected}


@pytest.fixture
def fresh(copy: Workspace) -> Workspace:
    """The data of the finished run, with its checkpoints set aside."""
    (copy.path / "ckpt").rename(copy.path / "single")
    return copy


def command(workspace: Workspace, layout: str) -> list[str]:
    config = f"pretrain={{cpus_per_task: 1, parallel: {{{LAYOUTS[layout]}}}}}"
    (line,) = shell_lines(workspace, TARGET, config)
    assert line.startswith("python scripts/pretrain.py ")
    return ["bash", "-c", line]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_losses_of_one(fresh: Workspace, layout: str):
    result = fresh.run(*command(fresh, layout))
    assert result.status == 0, result.output[-3000:]
    expected = losses(fresh.path / "single/pretrain/broad")
    assert len(expected["loss"]) == 6
    difference = worst(losses(fresh.path / TARGET), expected)
    print(f"{layout}: largest differences {difference}")
    assert max(difference.values()) < TOLERANCE.get(layout, OTHERWISE)


def test_a_checkpoint_of_one_layout_continues_in_others(fresh: Workspace):
    """To step 4 under TP, to 8 under PP and to the end under EP with DP: the losses of one process."""
    for layout, iteration in (("tp", 4), ("pp", 8)):
        run_until(fresh, command(fresh, layout), saved(fresh.path / "ckpt", iteration), signal.SIGKILL)
    result = fresh.run(*command(fresh, "ep"))
    assert result.status == 0, result.output[-3000:]
    assert "continues after step 8" in result.output
    difference = worst(losses(fresh.path / TARGET), losses(fresh.path / "single/pretrain/broad"))
    print(f"tp, pp, ep: largest differences {difference}")
    assert max(difference.values()) < OTHERWISE

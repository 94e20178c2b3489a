"""Four phases with lengths, layouts and schedules of their own, prolonged and killed on the way."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

from snaketron.jobs.version import Version
from tests.conftest import MEGATRON, Workspace
from tests.end_to_end.processes import run_forked, run_until, saved, shell_lines
from tests.end_to_end.test_kill import metrics, weights

import pytest
import yaml

MODEL = {
    "hybrid_layer_pattern": "ME*",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "mtp_num_layers": 1,
    "mtp_hybrid_layer_pattern": "*E",
}
MIX = [{"corpus": "docs", "weight": 0.5}, {"corpus": "code", "weight": 0.5}]
STEP = 8 * 64  # tokens
MOST, LEAST = 4e-3, 4e-4


def curriculum(steps: int) -> dict[str, Any]:
    """`steps` of the first phase, 6 of the second, at whose end the rate falls, and 3 of the others."""
    phases = [
        {"name": "one", "tokens": steps * STEP, "blend": MIX},
        {
            "name": "two",
            "tokens": 6 * STEP,
            "blend": MIX,
            "parallel": {"tensor_model_parallel_size": 2},
        },
        {
            "name": "long",
            "tokens": 3 * 4 * 256,
            "blend": MIX,
            "seq_length": 256,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-4,
            "parallel": {"context_parallel_size": 2},
        },
        {
            "name": "mixed",
            "seed": 5,
            "tokens": 3 * 16 * 32,
            "blend": MIX[:1],
            "seq_length": 32,
            "global_batch_size": 16,
            "learning_rate": 5e-5,
            "parallel": {"expert_model_parallel_size": 2, "data_parallel_size": 2},
        },
    ]
    pretrain = {
        "seq_length": 64,
        "warmup_tokens": 2 * STEP,
        "decay_tokens": 4 * STEP,
        "optimizer": {"learning_rate": MOST, "min_learning_rate": LEAST},
        "log_interval": 3,
        "eval_interval": 100,
        "save_interval": 4,
        "phases": phases,
    }
    return {"model": MODEL, "pretrain": pretrain}


def commands(copy: Workspace, steps: int, target: str) -> dict[str, str]:
    """The trainings by phase, after their data is made by processes that have imported megatron-core."""
    shutil.rmtree(copy.path / "data/pretrain", ignore_errors=True)
    for link in (copy.path / "ckpt/pretrain").glob("*"):  # of which Snakemake does not know the parameters
        link.unlink()
    copy.write("curriculum.yaml", yaml.safe_dump(curriculum(steps)))
    work = Workspace(copy.path, (*copy.overlays, "curriculum.yaml"))
    trainings = {}
    for line in shell_lines(work, f"ckpt/pretrain/{target}"):
        script, *words = shlex.split(line.partition("python ")[2])
        if script == "scripts/pretrain.py":
            trainings[Path(words[words.index("--output") + 1]).name] = line
            continue
        (status,), output = MEGATRON.run([script, *words], copy.path, [dict(os.environ)], 600)
        assert status == 0, output[-3000:]
    return trainings


def rates(checkpoint: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line["learning_rate"] for line in lines if "loss" in line}


def valid_losses(ckpt: Path, phase: str) -> list[float]:
    return [line["valid_loss"] for line in metrics(ckpt / "pretrain" / phase) if "valid_loss" in line]


def rate(phase: str, step: int) -> float:
    """The rate of a step by hand: it rises over 2 steps, stays for 12, and falls over 4 by 1 - sqrt."""
    done = step - 1 + {"one": 0, "two": 10}.get(phase, 0)
    if phase in ("long", "mixed"):
        return {"long": 1e-4, "mixed": 5e-5}[phase]
    if done < 2:
        return MOST * done / 2
    return LEAST + (MOST - LEAST) * (1 - math.sqrt(max(0, done - 12) / 4))


def test_four_phases_are_prolonged_killed_and_end_as_if_nothing_had_been(copy: Workspace):
    ckpt = copy.path / "ckpt"
    shutil.rmtree(ckpt)
    (short,) = commands(copy, 5, "one").values()
    assert run_forked(copy, short).status == 0
    assert set(rates(ckpt / "pretrain/one")) == {3, 5}
    # The first phase is made longer, continues, and is killed; then all four are trained.
    lines = commands(copy, 10, "mixed")
    assert list(lines) == ["one", "two", "long", "mixed"]
    _, said = run_until(copy, ["bash", "-c", lines["one"]], saved(ckpt, 8), signal.SIGKILL)
    assert "pretrain/one: continues at step 5 of pretrain_one-" in said
    for line in lines.values():
        result = run_forked(copy, line)
        assert result.status == 0, result.output[-3000:]
    at = {name: rates(ckpt / "pretrain" / name) for name in lines}
    print(at)
    assert at == {name: {n: pytest.approx(rate(name, n)) for n in at[name]} for name in lines}
    assert [list(steps) for steps in at.values()] == [[3, 6, 9, 10], [3, 6], [3], [3]]
    # Each begins with what the one before it has become, whatever the layout and the length.
    for before, after in pairwise(lines):
        inputs = yaml.safe_load((ckpt / "pretrain" / after / "config.yaml").read_text())["inputs"]
        assert inputs[-1]["version"] == Version(ckpt / "pretrain" / before).identity
    last, first = (losses[0] for losses in (valid_losses(ckpt, "one")[::-1], valid_losses(ckpt, "two")))
    assert first == pytest.approx(last, abs=1e-5)
    # The first phase is what a training of that length has been from its first step.
    ckpt.rename(copy.path / "prolonged")
    assert run_forked(copy, lines["one"]).status == 0
    for compare in (weights, metrics):
        assert compare(ckpt / "pretrain/one") == compare(copy.path / "prolonged/pretrain/one")

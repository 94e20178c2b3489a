"""The same training under every way of sharing the model between two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from snaketron.config import Model, Parallel
from snaketron.sizes.stages import pipeline_stages
from tests.conftest import Workspace, copy_of
from tests.end_to_end.processes import kill_forked, newest, run_forked, saved, shell_lines

import pytest
import yaml

TOLERANCE = 1e-5  # how far a loss of about 7 may be off, in nats, over 12 steps: sums in another order

EP = "{expert_model_parallel_size: 2, data_parallel_size: 2}"
LAYOUTS = {
    "tp": "parallel: {tensor_model_parallel_size: 2}",  # with sequence parallelism
    "ep": f"parallel: {EP}, moe_token_dispatcher: allgather",
    "ep_alltoall": f"parallel: {EP}, moe_token_dispatcher: alltoall",
    "pp": "parallel: {pipeline_model_parallel_size: 2}",
    "cp": "parallel: {context_parallel_size: 2}",
    "dp": "parallel: {data_parallel_size: 2}",
}
TARGET = "ckpt/pretrain/broad"
# More than the main job has: experts in both stages of a pipeline, which are ME* and E, two depths of
# multi-token prediction. Its larger weights keep a token from lying between two experts, where a last bit
# would decide.
DEEPER = """
model: {hybrid_layer_pattern: ME*E, mtp_num_layers: 2, mtp_hybrid_layer_pattern: '*E', init_method_std: 0.06}
"""


def losses(checkpoint: Path) -> dict[str, list[float]]:
    """Training, validation and multi-token prediction losses, in order."""
    lines = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    keys = ("loss", "valid_loss", "mtp_1_loss", "load_balancing_loss")
    return {key: [line[key] for line in lines if key in line] for key in keys}


def worst(found: dict[str, list[float]], expected: dict[str, list[float]]) -> dict[str, float]:
    return {key: max(abs(a - b) for a, b in zip(found[key], expected[key], strict=True)) for key in expected}


@pytest.fixture(scope="module")
def deeper(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The data of the finished run, on which one process has trained a model that is worth sharing."""
    workspace = copy_of(finished, tmp_path_factory.mktemp("deeper") / "work")
    shutil.rmtree(workspace.path / "ckpt")
    workspace.write("deeper.yaml", DEEPER)
    workspace.overlays = (*workspace.overlays, "deeper.yaml")
    (training,) = shell_lines(workspace, TARGET)
    result = run_forked(workspace, training)
    assert result.status == 0, result.output[-3000:]
    return workspace


def test_the_stages_of_the_pipeline_are_uneven():
    micro = yaml.safe_load((Path(__file__).parents[1] / "config/micro.yaml").read_text())
    model = Model(**(micro["model"] | yaml.safe_load(DEEPER)["model"]))
    parallel = Parallel(**yaml.safe_load(LAYOUTS["pp"])["parallel"])
    assert pipeline_stages(model, micro["tokenizer"]["vocab_size"], parallel) == ["ME*", "E"]


@pytest.fixture
def trained(deeper: Workspace, tmp_path: Path) -> Workspace:
    return copy_of(deeper, tmp_path / "deeper")


@pytest.fixture
def fresh(trained: Workspace) -> Workspace:
    """With the checkpoint of one process set aside."""
    (trained.path / "ckpt").rename(trained.path / "single")
    return trained


def line(workspace: Workspace, layout: str) -> str:
    config = f"pretrain={{cpus_per_task: 1, {LAYOUTS[layout]}}}"
    (found,) = shell_lines(workspace, TARGET, config)
    assert found.startswith("python scripts/pretrain.py ")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_losses_of_one(fresh: Workspace, layout: str):
    result = run_forked(fresh, line(fresh, layout))
    assert result.status == 0, result.output[-3000:]
    expected = losses(fresh.path / "single/pretrain/broad")
    assert len(expected["loss"]) == 6
    difference = worst(losses(fresh.path / TARGET), expected)
    print(f"{layout}: largest differences {difference}")
    assert max(difference.values()) < TOLERANCE


def test_a_checkpoint_of_one_layout_continues_in_others(fresh: Workspace):
    """To step 4 under TP, to 8 under PP and to the end under EP with DP: the losses of one process."""
    for layout, iteration in (("tp", 4), ("pp", 8)):
        kill_forked(fresh, line(fresh, layout), saved(fresh.path / "ckpt", iteration))
    left = newest(fresh.path / "ckpt", "pretrain_broad-*")
    result = run_forked(fresh, line(fresh, "ep"))
    assert result.status == 0, result.output[-3000:]
    assert left >= 8 and f"continues after step {left}" in result.output
    difference = worst(losses(fresh.path / TARGET), losses(fresh.path / "single/pretrain/broad"))
    print(f"tp, pp, ep: largest differences {difference}")
    assert max(difference.values()) < TOLERANCE


def test_a_phase_has_a_layout_a_length_and_a_rate_of_its_own(copy: Workspace):
    """It starts from weights and moments of one process under the schedule, which is not trained again."""
    phases = yaml.safe_load((copy.path / "tests/config/micro.yaml").read_text())["pretrain"]["phases"]
    phases[1] |= {"parallel": {"tensor_model_parallel_size": 2}, "seq_length": 64, "learning_rate": 1e-4}
    pretrain = yaml.safe_dump({"phases": phases, "decay_tokens": 0}, default_flow_style=True, width=10_000)
    config = f"pretrain={pretrain.strip()}"
    target = "ckpt/pretrain/focused"
    planned = copy.snakemake("-n", target, config=(config,))
    assert planned.jobs == {"index_pretrain": 1, "pretrain": 1}, planned.output
    assert copy.snakemake("data/pretrain/focused/index.json", config=(config,)).status == 0
    (training,) = shell_lines(copy, target, config)
    result = run_forked(copy, training)
    assert result.status == 0, result.output[-3000:]
    lines = [json.loads(line) for line in (copy.path / target / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert {line["learning_rate"] for line in steps} == {1e-4}
    assert steps[-1]["iteration"] == 16  # of 8 x 64 tokens; with 8 x 128 there were 8
    untrained = losses(copy.path / "ckpt/pretrain/broad")["valid_loss"][0]
    assert losses(copy.path / target)["valid_loss"][0] < untrained - 0.5


def test_packs_are_tuned_on_alike_in_every_layout(trained: Workspace):
    """Two steps by token and two by conversation, over packs with room for each layout.

    A large weight of the load balancing loss shows whether ranks with and without padding weigh it alike.
    """
    steps = "cpus_per_task: 1, train_iters: 4, log_interval: 1, num_samples: 0, switch_loss_average_after: 2"
    steps += ", optimizer: {learning_rate: 0.001, min_learning_rate: 0.0001}"
    packs, model = "sft_data={padding_multiple: 4}", "model={moe_aux_loss_coeff: 0.1}"
    assert trained.snakemake("data/sft/blend.json", config=(packs,)).status == 0
    found = {}
    for layout, sizes in {"one": "parallel: {}", **LAYOUTS}.items():
        (trained.path / "ckpt/sft").unlink(missing_ok=True)
        for old in trained.path.glob("ckpt/versions/sft-*"):
            shutil.rmtree(old)
        config = [f"sft={{{steps}, {sizes}}}", packs, model]
        *_, training = shell_lines(trained, "ckpt/sft", *config)
        result = run_forked(trained, training.replace("--base ckpt/pretrain/focused", f"--base {TARGET}"))
        assert result.status == 0, result.output[-3000:]
        lines = [
            json.loads(line) for line in (trained.path / "ckpt/sft/metrics.jsonl").read_text().splitlines()
        ]
        keys = ("loss", "sample_loss", "mtp_1_loss", "mtp_2_loss", "load_balancing_loss", "grad_norm")
        keys += ("valid_loss",)
        found[layout] = {key: [line[key] for line in lines if key in line] for key in keys}
    for layout in LAYOUTS:
        difference = worst(found[layout], found["one"])
        print(f"{layout}: largest differences {difference}")
        assert max(difference.values()) < TOLERANCE, layout

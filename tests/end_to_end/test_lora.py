"""LoRA as the workflow runs it: in every layout, killed, merged, and refused where it cannot be."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from snaketron.lineage.record import read
from tests.conftest import Workspace, copy_of
from tests.end_to_end.processes import (
    exists,
    kill_forked,
    newest,
    run_forked,
    run_until,
    saved,
    shell_lines,
)
from tests.end_to_end.test_kill import half_written, metrics, weights
from tests.end_to_end.test_layouts import losses, worst

import pytest
import yaml

# Every linear layer but the router: Adam would turn the last bits of its tiny gradients into whole steps.
EVERYTHING = "target_modules: [linear_*, '*_proj']"
RATE = "optimizer: {learning_rate: 0.01}"  # at which the adapters of so small a model learn in ten steps
# In nats, of losses about 6: under TP a last bit sends a token to another expert (4e-5). That the gradients
# are the same to 1e-5 of the largest, the router's too, is in tests/unit/train/test_lora.py.
TOLERANCE = 1e-4
LAYOUTS = {
    "tp": "tensor_model_parallel_size: 2, expert_tensor_parallel_size: 2",  # with sequence parallelism
    "tp, ep": "tensor_model_parallel_size: 2, expert_model_parallel_size: 2",
    "pp": "pipeline_model_parallel_size: 2",  # M* and E: the first stage has no experts
    "ep": "expert_model_parallel_size: 2, data_parallel_size: 2",
    "etp": "expert_tensor_parallel_size: 2, data_parallel_size: 2",
}


def config(layout: str = "data_parallel_size: 1") -> str:
    return f"lora={{{EVERYTHING}, {RATE}, cpus_per_task: 1, parallel: {{{layout}}}}}"


@pytest.fixture(scope="module")
def tuned(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The main job's run, with ckpt/lora and ckpt/lora_merged made by one process."""
    workspace = copy_of(finished, tmp_path_factory.mktemp("lora") / "work")
    result = workspace.snakemake("ckpt/lora_merged", config=(config(),))
    assert result.status == 0, result.output[-5000:]
    assert result.jobs == {"lora": 1, "merge_lora": 1}
    (workspace.path / "transcript.txt").write_text(result.output)
    return workspace


@pytest.fixture
def again(tuned: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the tuned workflow from before LoRA; what one process made of it lies in `single`."""
    copy = copy_of(tuned, tmp_path / "work")
    (copy.path / "single").mkdir()
    for name in ("lora", "lora_merged"):
        published = copy.path / "ckpt" / name
        shutil.move(published.resolve(), copy.path / "single" / name)
        published.unlink()
    return copy


def commands(workspace: Workspace, layout: str) -> list[str]:
    """The commands of lora.py and merge_lora.py in a layout."""
    lines = shell_lines(workspace, "ckpt/lora_merged", config(layout))
    assert [line.split()[1] for line in lines] == ["scripts/lora.py", "scripts/merge_lora.py"]
    return lines


def norms(checkpoint: Path) -> list[float]:
    return [line["grad_norm"] for line in metrics(checkpoint) if "grad_norm" in line]


def valid_losses(checkpoint: Path) -> list[float]:
    return [line["valid_loss"] for line in metrics(checkpoint) if "valid_loss" in line]


def test_adapters_learn_and_are_small(tuned: Workspace):
    """The loss falls, and the checkpoint holds a sixth of what that of full fine-tuning does."""
    ckpt = tuned.path / "ckpt"
    found = valid_losses(ckpt / "lora")
    assert found[-1] < found[0] - 0.2
    sizes = {
        name: sum(p.stat().st_size for p in (ckpt / name / "iter_0000010").iterdir())
        for name in ("lora", "sft", "lora_merged")
    }
    print(f"validation losses {found}, bytes {sizes}")
    assert sizes["lora"] < sizes["sft"] / 5
    config = yaml.safe_load((ckpt / "lora/config.yaml").read_text())
    assert config["settings"]["lora"]["rank"] == 8
    base = read(ckpt / "pretrain/focused/record.json")
    assert {"path": "ckpt/pretrain/focused", "version": f"{base.name}-{base.key}"} in config["inputs"]
    summary = (ckpt / "lora/summary.md").read_text()
    assert "| lora " in summary and "tuned model:" in summary


def test_merging_keeps_the_loss(tuned: Workspace):
    ckpt = tuned.path / "ckpt"
    before, after = valid_losses(ckpt / "lora_merged")
    assert before == valid_losses(ckpt / "lora")[-1]
    assert after == pytest.approx(before, abs=1e-6)
    record = read(ckpt / "lora_merged/record.json")
    assert record.name == "lora_merged"
    assert [entry.path for entry in record.inputs if entry.version] == [
        "ckpt/pretrain/focused",
        "ckpt/lora",
    ]
    assert "lora_merged: validation loss" in (tuned.path / "transcript.txt").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_adapters_and_the_merged_model_of_one(again: Workspace, layout: str):
    for line in commands(again, LAYOUTS[layout]):
        result = run_forked(again, line)
        assert result.status == 0, result.output[-3000:]
    single, ckpt = again.path / "single", again.path / "ckpt"
    difference = worst(losses(ckpt / "lora"), losses(single / "lora"))
    norm = max(abs(a / b - 1) for a, b in zip(norms(ckpt / "lora"), norms(single / "lora"), strict=True))
    merged = valid_losses(ckpt / "lora_merged")
    print(f"{layout}: largest differences {difference}, gradient norms {norm:.1e}, merged {merged}")
    assert max(difference.values()) < TOLERANCE and norm < 1e-3
    assert merged == pytest.approx(valid_losses(single / "lora_merged"), abs=TOLERANCE)
    assert merged[1] == pytest.approx(merged[0], abs=1e-6)


def test_a_checkpoint_of_one_layout_continues_in_others(again: Workspace):
    """To step 4 under TP, to 8 under PP, to the end under EP with DP: the losses of one process."""
    for layout, iteration in (("tp", 4), ("pp", 8)):
        line, _ = commands(again, LAYOUTS[layout])
        kill_forked(again, line, saved(again.path / "ckpt", iteration, "lora-*"))
    line, _ = commands(again, LAYOUTS["ep"])
    left = newest(again.path / "ckpt", "lora-*")
    result = run_forked(again, line)
    assert result.status == 0, result.output[-3000:]
    assert left >= 8 and f"continues after step {left}" in result.output
    difference = worst(losses(again.path / "ckpt/lora"), losses(again.path / "single/lora"))
    print(f"tp, pp, ep: largest differences {difference}")
    assert max(difference.values()) < TOLERANCE


def test_killed_in_the_middle_it_ends_with_the_same_bytes(again: Workspace):
    """While the second checkpoint is written, and again while the merged one is."""
    inside = half_written(again.path / "ckpt", "lora-*")
    target = ("ckpt/lora_merged",)
    run_until(again, again.command(*target, config=(config(),)), inside, signal.SIGKILL)
    left = newest(again.path / "ckpt", "lora-*")
    merging = exists(again.path / "ckpt", "versions/lora_merged-*/.iter_*.partial/*")
    _, output = run_until(again, again.command(*target, config=(config(),)), merging, signal.SIGKILL)
    assert left >= 4 and f"continues after step {left}" in output
    assert not (again.path / "ckpt/lora_merged").exists()
    result = again.snakemake(*target, config=(config(),))
    assert result.status == 0 and result.jobs == {"merge_lora": 1}, result.output[-3000:]
    for name in ("lora", "lora_merged"):
        made, single = again.path / "ckpt" / name, again.path / "single" / name
        assert weights(made) == weights(single) and metrics(made) == metrics(single)
        assert not list(made.glob(".*.partial"))


def test_the_merged_checkpoint_is_a_base_and_the_adapters_are_none(tuned: Workspace, tmp_path: Path):
    """SFT starts at the merged loss; from ckpt/lora it is refused, and adapters of another base as well."""
    copy = copy_of(tuned, tmp_path / "work")
    line = next(line for line in shell_lines(copy, "ckpt/sft", "sft={train_iters: 3}") if "sft.py" in line)
    from_merged = line.replace("--base ckpt/pretrain/focused", "--base ckpt/lora_merged")
    result = run_forked(copy, from_merged)
    assert result.status == 0, result.output[-3000:]
    first, *_ = valid_losses(copy.path / "ckpt/sft")
    assert first == pytest.approx(valid_losses(copy.path / "ckpt/lora_merged")[-1], abs=1e-6)

    result = copy.run("bash", "-c", line.replace("--base ckpt/pretrain/focused", "--base ckpt/lora"))
    assert result.status == 1 and "ckpt/lora holds adapters and not the model: merge them" in result.output

    (copy.path / "ckpt/lora_merged").unlink()
    (merge,) = shell_lines(copy, "ckpt/lora_merged", config())
    result = copy.run(
        "bash", "-c", merge.replace("--base ckpt/pretrain/focused", "--base ckpt/pretrain/broad")
    )
    assert result.status == 1, result.output
    assert "ckpt/lora was trained on pretrain/focused-" in result.output
    assert "which ckpt/pretrain/broad is not (any more)" in result.output
    assert "Traceback" not in result.output


def test_what_runs_again(tuned: Workspace):
    """A key of the adapters: both rules. A key of SFT, or how LoRA is run: neither."""
    assert tuned.snakemake("-n", "ckpt/lora_merged", config=(config(),)).jobs == {}
    for changes, jobs in (
        ((config("data_parallel_size: 2"),), {}),
        ((config(), "sft={train_iters: 20}"), {}),
        ((config()[:-1] + ", rank: 4}",), {"lora": 1, "merge_lora": 1}),
    ):
        assert tuned.snakemake("-n", "ckpt/lora_merged", config=changes).jobs == jobs, changes

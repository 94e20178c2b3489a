"""What the rules of trainings ask of the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snaketron.config import ConfigError, load
from snaketron.graph.base import BaseGraph
from snaketron.graph.training import TrainingGraph
from snaketron.settings.training import train_settings
from snaketron.sizes.limits import Limits
from snaketron.sources.lockfile import Lock
from tests.unit.huggingface.checkpoints import MODEL, values, write

import pytest
import yaml

MIX = [{"corpus": "docs", "weight": 1}]
PHASES = [{"name": name, "tokens": 100_000, "blend": MIX} for name in ("one", "two", "three")]


def training(**changes: Any) -> TrainingGraph:
    config = load({"pretrain": {"phases": PHASES}} | changes, {})
    return TrainingGraph(config, BaseGraph(config, Lock(Path("sources.lock.json"), {})))


def job(**wildcards: str) -> SimpleNamespace:
    return SimpleNamespace(**wildcards)


def test_a_phase_starts_from_the_one_before_it():
    assert training().previous_phase(job(phase="one")) == []
    assert training().previous_phase(job(phase="two")) == ["<ckpt>/pretrain/one"]
    assert training().previous_phase(job(phase="three")) == ["<ckpt>/pretrain/two"]
    assert training().base("sft") == "<ckpt>/pretrain/three"


def test_adapters_belong_to_the_export_of_what_they_were_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """transformers cannot load ckpt/sft itself. No rule exports a version that no stage leads to."""
    monkeypatch.chdir(tmp_path)

    def adapters(**keys: str) -> str:
        return training(lora={"target_modules": ["linear_qkv"]} | keys).exported_base(job())

    assert adapters() == "hf/pretrain/three"
    for name in ("sft-1", "sft-2"):
        version = tmp_path / "ckpt/versions" / name
        write(version / "iter_0000002", values(MODEL))
        settings = train_settings(load({}, {}), "sft").model_dump()
        (version / "config.yaml").write_text(yaml.safe_dump({"settings": settings}))
        (version / "record.json").write_text("{}")
        (version / "latest_checkpointed_iteration.txt").write_text("2")
    Path("ckpt/sft").symlink_to("versions/sft-2")
    for base in ("ckpt/sft", str(tmp_path / "ckpt/sft"), "ckpt/versions/sft-2"):
        assert adapters(base=base) == "hf/sft"
    with pytest.raises(ConfigError, match=r"ckpt/versions/sft-1 is not what ckpt/sft leads to, so no rule"):
        adapters(base="ckpt/versions/sft-1")


def test_an_average_takes_two_checkpoints_and_the_graph_says_so_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Phases of 98 steps (100,000 tokens, 1,024 a step); every 100 steps leaves the last checkpoint alone."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        training().averaged(job(phase="one"))
    assert str(error.value) == (
        "pretrain.keep_steady 1, steady_interval 100: pretrain/one would keep 1 checkpoint from before its "
        "learning rate falls, after step 98 of 98, and an average takes two"
    )
    more = training(pretrain={"phases": PHASES, "keep_steady": 3, "steady_interval": 30})
    assert more.averaged(job(phase="one")) == "<ckpt>/pretrain/one"
    trained = tmp_path / "ckpt/pretrain/one"  # with the same keys: there is one indeed
    (trained / "iter_0000098").mkdir(parents=True)
    with pytest.raises(ConfigError, match="would keep 1 checkpoint"):
        training().averaged(job(phase="one"))
    (trained / "iter_0000060").mkdir()  # with other keys: its checkpoints decide
    assert training().averaged(job(phase="one")) == "<ckpt>/pretrain/one"


def test_settings_are_json_of_one_stage():
    assert json.loads(training().settings("pretrain")(job(phase="two")))["stage"] == "pretrain/two"
    assert json.loads(training().settings("sft")(job()))["stage"] == "sft"
    assert json.loads(training().resources("sft")["run"])["micro_batch_size"] == 1


def test_a_training_has_the_threads_of_its_processes_on_a_node():
    parallel = {"tensor_model_parallel_size": 2, "data_parallel_size": 2}
    sft = {"cpus_per_task": 3, "global_batch_size": 2, "parallel": parallel}
    assert training().threads("pretrain") == 1
    assert training(sft=sft).threads("sft") == 4 * 3
    assert training(sft=sft, cluster={"tasks_per_node": 2}).threads("sft") == 2 * 3


def test_phases_of_one_layout_ask_for_the_same():
    """Phases without sizes of their own: Snakemake gets numbers, and no functions of the phase."""
    asked = training(cluster={"gpus_per_node": 8}).resources("pretrain")
    assert (asked["nodes"], asked["mem_mb"], asked["gres"]) == (1, 4000, "gpu:1")
    assert "mpi" not in asked and isinstance(asked["run"], str)


def test_a_phase_of_another_layout_asks_for_its_own():
    """The second phase needs two nodes of two GPUs, and the other ones a single GPU."""
    parallel = {"tensor_model_parallel_size": 2, "data_parallel_size": 2}
    own = {"parallel": parallel, "mem_gb_per_task": 5, "save_interval": 20, "micro_batch_size": 2}
    phases = [PHASES[0], PHASES[1] | own, PHASES[2]]
    made = training(pretrain={"phases": phases}, cluster={"gpus_per_node": 2})
    asked = made.resources("pretrain")

    def of(name: str) -> list[Any]:
        return [asked[name](job(phase=phase)) for phase in ("one", "two", "three")]

    assert (of("nodes"), of("mem_mb")) == ([1, 2, 1], [4000, 10_000, 4000])
    assert of("gres") == ["gpu:1", "gpu:2", "gpu:1"]
    assert of("mpi") == [None, "srun", None] and of("tasks_per_node") == [None, 2, None]
    assert [json.loads(run).get("save_interval") for run in of("run")] == [None, 20, None]
    assert [made.threads("pretrain")(job(phase=phase)) for phase in ("one", "two")] == [1, 2]


def test_a_retry_of_snakemake_is_told_to_the_training():
    asked = training().resources("sft")
    assert asked["attempt"](None, 2) == 2
    assert json.loads(asked["run"])["eval_samples"] == 16  # only what differs from the defaults


def test_what_merges_adapters_is_told_what_trained_them():
    trained, merged = (
        json.loads(training().settings("lora", stage=stage)(job())) for stage in (None, "lora_merged")
    )
    assert (trained.pop("stage"), merged.pop("stage")) == ("lora", "lora_merged")
    assert trained == merged and trained["lora"]["rank"] == 64


def test_lora_that_does_not_fit_is_refused_only_when_it_is_to_run():
    cramped = training(cluster={"gpus_per_node": 1, "gpu_memory_gb": 0.001})
    cramped.settings("sft")(job())
    asked = cramped.settings("lora")
    with pytest.raises(ConfigError, match=r"lora\.parallel: takes 0\.0"):
        asked(job())


def test_merging_adapters_needs_memory_of_a_node_for_the_whole_model():
    """Adapters that fit are trained, and merged if the rule that does so gets more: 4 bytes a parameter."""
    graph = training(cluster={"gpus_per_node": 1}, lora={"rank": 4, "expert_rank": 1})
    graph.limits = {"lora": Limits(mem_mb=957), "lora_merged": Limits(mem_mb=957)}
    graph.settings("lora")(job())
    with pytest.raises(
        ConfigError, match=r"set-resources merge_lora: mem_mb 957 .* a process of merge_lora needs"
    ):
        graph.settings("lora", stage="lora_merged")(job())
    graph.limits = {"lora": Limits(mem_mb=957), "lora_merged": Limits(mem_mb=962)}
    graph.settings("lora", stage="lora_merged")(job())

"""What the rules of trainings ask of the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snaketron.config import ConfigError, load
from snaketron.graph.base import BaseGraph
from snaketron.graph.training import TrainingGraph, missing_tasks
from snaketron.settings.evaluation import EvalSettings
from snaketron.sizes.limits import Limits
from snaketron.sources.lockfile import Lock

import pytest

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


def test_a_task_is_told_the_directory_that_its_data_is_downloaded_to(tmp_path: Path):
    config = load({"eval": {"tasks": [{"name": "mmlu", "data": "lab/quiz"}, {"name": "own"}]}}, {})
    lock = Lock(tmp_path / "lock.json", {})
    asked = TrainingGraph(config, BaseGraph(config, lock))
    with pytest.raises(ConfigError, match=r"eval\.tasks\[0\]\.data: lab/quiz is no directory here"):
        asked.eval_settings(SimpleNamespace(stage="sft"))
    request = {"dataset": "lab/quiz", "revision": "main"}
    file = {"name": "one/test.parquet", "address": "", "size": 1, "sha256": "00"}
    lock.models["datasets/lab/quiz"] = {"request": request, "revision": "abc", "files": [file]}
    settings = json.loads(asked.eval_settings(SimpleNamespace(stage="sft")))
    assert [task["data"] for task in settings["tasks"]] == ["data/hub/datasets/lab/quiz@abc", None]
    assert asked.task_data(None) == ["<data>/hub/datasets/lab/quiz@abc/one/test.parquet"]


def test_an_evaluation_is_made_of_the_files_of_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """But what Python compiles of them, and what a download notes, which say nothing of their content."""
    monkeypatch.chdir(tmp_path)
    for name in ("own/a.yaml", "own/utils.py", "quiz/one/test.parquet", "quiz/README.md"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("content")
    for name in ("own/__pycache__/utils.pyc", "quiz/.cache/lock"):
        Path(name).parent.mkdir()
        Path(name).write_text("content")
    tasks = [{"name": "a"}, {"name": "quiz", "data": "quiz"}, {"name": "quiz_2", "data": "quiz"}]
    config = load({"eval": {"tasks": tasks, "task_directories": ["own"]}}, {})
    graph = TrainingGraph(config, BaseGraph(config, Lock(tmp_path / "lock.json", {})))
    files = ["own/a.yaml", "own/utils.py", "quiz/README.md", "quiz/one/test.parquet"]
    assert graph.task_data(None) == files
    settings = EvalSettings.model_validate_json(graph.eval_settings(SimpleNamespace(stage="sft")))
    assert settings.task_files == files
    Path("own/{a}.yaml").touch()
    with pytest.raises(ConfigError, match=r"eval\.tasks: 'own/\{a\}\.yaml' holds a brace"):
        graph.task_data(None)


def test_data_of_tasks_that_is_not_here_is_named_at_once(tmp_path: Path):
    """One has its data, one is given none, which may be in the cache of the hub."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc/README.md").write_text("---\n---\n")
    names = {"arc_easy": "arc", "mmlu": "none", "hellaswag": "empty"}
    tasks = [{"name": name, "data": str(tmp_path / of)} for name, of in names.items()]
    config = load({"eval": {"tasks": [*tasks, {"name": "winogrande"}], "task_directories": ["own"]}}, {})
    advice = "; download the data set on a machine with a network"
    assert list(missing_tasks(config.eval)) == [
        "eval.task_directories[0]: own is not there; name the directory of your own tasks",
        f"eval.tasks[1].data: {tmp_path / 'none'} of mmlu is not there{advice}",
        f"eval.tasks[2].data: {tmp_path / 'empty'} of hellaswag is empty{advice}",
    ]

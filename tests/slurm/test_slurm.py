"""The same workflow through a real Slurm: every rule a job, and the same files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from snaketron.graph.journal import Journal
from tests.conftest import REPOSITORY, Result, Workspace, copy_of
from tests.end_to_end.test_kill import begin_again, contents, metrics, weights
from tests.slurm.cluster import CLIENTS, DAEMONS
from tests.slurm.conftest import Slurm

import pytest
import yaml

# Prints a line of JSON whenever what the package says of the jobs of a directory has changed.
WATCH = [
    *(sys.executable, "-c"),
    "import json, sys; from pathlib import Path; from snaketron.jobs import status;"
    "here = Path(sys.argv[1]);"
    "status.report_every(0.2, here, here / 'ckpt', lambda said: print(json.dumps(said), flush=True)).join()",
]


def test_the_main_job_on_two_nodes(slurm: Slurm, two_nodes: Workspace, finished: Workspace):
    """Every rule a job, with the CPUs and nodes that it asked for; the data is that of a local run."""
    assert contents(two_nodes.path / "data") == contents(finished.path / "data")
    assert (two_nodes.path / "ckpt/sft/summary.md").exists()
    jobs = slurm.jobs(two_nodes)
    assert {(job.state, job.partition, job.account, job.restarts) for job in jobs} == {
        ("COMPLETED", "tests", "tests", 0)
    }
    asked = {job.rule: (job.nodes, job.cpus, job.memory) for job in jobs if job.rule in ("pretrain", "sft")}
    assert asked == {"pretrain": ("node[1-2]", 2, "2000M"), "sft": ("node[1-2]", 2, "2000M")}
    counts = Counter(job.rule for job in jobs)
    # Three shards of text are tokenized in one group, two of chats rendered in one and packed in one.
    groups = ("tokens_tokenize_shard", "chats_render_chat", "packs_pack_sft")
    expected = {"pretrain": 2, "sft": 1, "sample_corpus": 2} | dict.fromkeys(groups, 1)
    assert {name: counts[name] for name in expected} == expected
    assert counts["tokenize_shard"] == counts["render_chat"] == 0
    assert {job.cpus for job in jobs if job.rule == "build_tokenizer"} == {2}  # its `threads`
    assert {job.cpus for job in jobs if job.rule in groups} == {1}


def test_the_processes_were_on_both_nodes(slurm: Slurm, two_nodes: Workspace):
    ids = [str(job.id) for job in slurm.jobs(two_nodes) if job.rule == "sft"]
    steps = slurm.accounting(f"--jobs={','.join(ids)}", columns=("JobID", "NodeList", "NTasks", "State"))
    assert [tuple(step.values())[1:] for step in steps if step["JobID"].endswith(".0")] == [
        ("node[1-2]", "2", "COMPLETED")
    ]


def test_the_journal_has_the_slurm_job_of_each_job_and_of_its_group(two_nodes: Workspace):
    journal = Journal(two_nodes.path)
    journal.look()
    assert {job.state for job in journal.jobs.values()} == {"finished"}
    numbers = {rule: [j.slurm for j in journal.jobs.values() if j.rule == rule] for rule in journal.totals}
    shards = numbers["tokenize_shard"]
    assert len(shards) == 3 and len({*shards}) == 1  # a group
    assert len({*numbers["pretrain"]}) == 2
    assert all(number.isdigit() for number in (*shards, *numbers["pretrain"], *numbers["sft"]))


def test_logs_and_the_efficiency_report_are_at_known_places(two_nodes: Workspace):
    assert (two_nodes.path / "logs/pretrain/broad.log").read_text().count("validation loss") == 3
    (log,) = (two_nodes.path / "logs/slurm/rule_sft").glob("*.log")
    assert "step 10/10" in log.read_text()
    (report,) = (two_nodes.path / "logs/slurm").glob("efficiency_report_*.csv")
    assert all(name in report.read_text() for name in ("rule_sft", "rule_build_tokenizer"))


@dataclass
class OneNode:
    """A phase of pretraining, done again on one node, and what was said of its job before and meanwhile."""

    workspace: Workspace
    undisturbed: Path
    result: Result
    before: str
    meanwhile: list[str]


@pytest.fixture(scope="module")
def one_node(slurm: Slurm, finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> OneNode:
    copy = copy_of(finished, tmp_path_factory.mktemp("one_node") / "work")
    undisturbed = begin_again(copy, "ckpt/pretrain/broad")
    programs = {"cwd": copy.path, "env": slurm.environment(), "text": True}
    command = [sys.executable, str(REPOSITORY / "scripts/status.py")]
    before = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **programs)
    said = copy.path / "said.jsonl"
    with said.open("w") as file, subprocess.Popen([*WATCH, str(copy.path)], stdout=file, **programs) as watch:
        try:
            with slurm.start(copy, "ckpt/pretrain/broad") as running:
                result = running.result()
        finally:
            watch.kill()
    assert result.status == 0, result.output[-5000:]
    meanwhile = [json.loads(line) for line in said.read_text().splitlines()]
    return OneNode(copy, undisturbed, result, before.stdout, meanwhile)


def test_a_training_on_one_node_ends_with_the_weights_of_a_local_one(slurm: Slurm, one_node: OneNode):
    assert one_node.result.jobs == {"pretrain": 1}
    (job,) = slurm.jobs(one_node.workspace)
    cpus = yaml.safe_load((one_node.undisturbed / "config.yaml").read_text())["run"]["cpus_per_task"]
    assert (job.rule, job.state, job.cpus, job.gres) == ("pretrain", "COMPLETED", cpus, "")
    again = one_node.workspace.path / "ckpt/pretrain/broad"
    assert weights(again) == weights(one_node.undisturbed)
    assert metrics(again) == metrics(one_node.undisturbed)


def test_a_job_is_a_line_with_the_progress_of_its_training(one_node: OneNode):
    said = one_node.meanwhile
    assert one_node.before.startswith("Slurm has no job of this directory. The files of the run say:\n")
    assert all(line.startswith("pretrain broad  ") and "\n" not in line for line in said)
    assert any(" RUNNING " in line and " on 1 node  step " in line and " loss " in line for line in said)
    assert len(said) == len(set(said))  # only what has changed


def test_gpus_are_asked_for_on_each_node_and_missed_where_torch_sees_none(slurm: Slurm, copy: Workspace):
    """The nodes declare GPUs that they do not have."""
    begin_again(copy, "ckpt/sft")
    config = ("cluster={gpus_per_node: 2}", "sft={parallel: {data_parallel_size: 4}, global_batch_size: 4}")
    result = slurm.run(copy, "ckpt/sft", config=config)
    assert result.status != 0
    assert "cluster.gpus_per_node is 2 and torch sees no GPU on " in result.output
    jobs = slurm.jobs(copy)
    assert {(job.rule, job.nodes, job.gres, job.state) for job in jobs} == {
        ("sft", "node[1-2]", "gres:gpu:2", "FAILED")
    }
    assert not (copy.path / "ckpt/sft").exists()


def test_a_profile_that_nobody_edited_is_refused_in_a_line(slurm: Slurm, workspace: Workspace):
    """The plugin's report added that it found no job data of a workflow that was named by its uuid."""
    target = "data/tokenizer/chat_template.jinja"
    command = ("snakemake", "--profile", "profiles/slurm", target)
    result = workspace.run(*command, environment=slurm.environment())
    assert result.status == 1
    assert (
        "install_chat_template has failed: it is refused and not submitted again: sbatch: invalid partition "
        "specified: cpu"
    ) in result.output
    assert "No job data" not in result.output


def test_a_dry_run_needs_no_slurm(workspace: Workspace, tmp_path: Path):
    """All commands of this machine but Slurm's are on PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for command in Path("/usr/bin").iterdir():
        if command.name not in (*CLIENTS, *DAEMONS):
            (commands / command.name).symlink_to(command)
    virtual_environment = Path(sys.executable).parent
    result = workspace.run(
        *("snakemake", "--profile", "profiles/slurm", "-np", "ckpt/sft"),
        environment={"PATH": f"{virtual_environment}:{commands}"},
    )
    assert result.status == 0, result.output
    assert "rule sft:" in result.output and "slurm_partition=cpu" in result.output

"""The same workflow through a real Slurm: every rule a job, and the same files."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from tests.conftest import Workspace
from tests.end_to_end.test_kill import begin_again, contents, weights
from tests.slurm.cluster import CLIENTS, DAEMONS
from tests.slurm.conftest import Slurm

import yaml


def test_data_that_slurm_jobs_make_is_the_same(slurm: Slurm, workspace: Workspace, finished: Workspace):
    result = slurm.run(workspace, "data/sft/blend.json", "data/pretrain/broad/index")
    assert result.status == 0, result.output[-5000:]
    expected = contents(finished.path / "data")
    expected = {name: digest for name, digest in expected.items() if "pretrain/focused" not in name}
    assert contents(workspace.path / "data") == expected
    jobs = slurm.jobs(workspace)
    assert result.jobs.keys() >= {"build_tokenizer", "tokenize_shard", "blend_pretrain", "blend_sft"}
    assert Counter(job.rule for job in jobs) == result.jobs
    assert {(job.state, job.partition, job.account) for job in jobs} == {("COMPLETED", "tests", "tests")}
    assert {job.cpus for job in jobs if job.rule == "build_tokenizer"} == {2}  # its `threads`
    assert {job.cpus for job in jobs if job.rule != "build_tokenizer"} == {1}
    assert {job.memory for job in jobs} == {"1000M"}


def test_a_training_in_a_slurm_job_ends_with_the_same_weights(slurm: Slurm, copy: Workspace):
    target = "ckpt/pretrain/broad"
    undisturbed = begin_again(copy, target)
    result = slurm.run(copy, target)
    assert result.status == 0, result.output[-5000:]
    assert result.jobs == {"pretrain": 1}
    (job,) = slurm.jobs(copy)
    cpus = yaml.safe_load((undisturbed / "config.yaml").read_text())["run"]["cpus_per_task"]
    assert (job.rule, job.state, job.cpus) == ("pretrain", "COMPLETED", cpus)
    assert weights(copy.path / target) == weights(undisturbed)


def test_a_dry_run_needs_no_slurm(workspace: Workspace, tmp_path: Path):
    """All commands of this machine but Slurm's are on PATH."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for command in Path("/usr/bin").iterdir():
        if command.name not in (*CLIENTS, *DAEMONS):
            (commands / command.name).symlink_to(command)
    virtual_environment = Path(sys.executable).parent
    result = workspace.run(
        *("snakemake", "--profile", "profiles/slurm", "-n", "ckpt/sft"),
        environment={"PATH": f"{virtual_environment}:{commands}"},
    )
    assert result.status == 0, result.output
    assert "rule sft:" in result.output and "slurm_partition=cpu" in result.output

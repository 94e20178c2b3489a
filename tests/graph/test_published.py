"""A published link names the last good version until the next one is complete."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from tests.conftest import REPOSITORY, Workspace

import pytest

# A training that takes a second, declared like the rules of the workflow.
SNAKEFILE = f"""
import sys
sys.path.insert(0, "{REPOSITORY}/scripts")
from snaketron.graph.snakemake import published
if config["kept"]:
    published.keep_what_failed()

rule train:
    output: update(directory("ckpt/sft"))
    params: steps=config["steps"]
    shell:
        "mkdir -p ckpt/versions/{{params.steps}} && cd ckpt && {{config[fate]}}"
        " && touch versions/{{params.steps}}/.snakemake_timestamp && ln -sfn versions/{{params.steps}} sft"

rule tokenize:
    output: "data/tokens"
    shell: "false"

rule export:
    input: "ckpt/sft"
    output: "export"
    shell: "touch export"
"""


class Toy:
    def __init__(self, path: Path) -> None:
        self.workspace = Workspace(path)
        self.workspace.write("Snakefile", SNAKEFILE)

    def run(self, steps: int, fate: str = "true", *options: str, kept: bool = True) -> str:
        config = [f"steps={steps}", f"fate={fate}", f"kept={kept}"]
        command = ["snakemake", "--cores", "1", "--nolock", "--rerun-incomplete", *options]
        return self.workspace.run(*command, "--config", *config).output

    @property
    def published(self) -> str:
        return str((self.workspace.path / "ckpt/sft").readlink())


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A finished training of 30 steps."""
    toy = Toy(tmp_path)
    toy.run(30)
    assert toy.published == "versions/30"
    return toy


def test_a_failed_training_leaves_the_link_and_is_run_again(toy: Toy):
    output = toy.run(60, "test $(readlink sft) = versions/30 && false")  # it is there while it trains
    assert "Error in rule train" in output and toy.published == "versions/30"
    assert "rule train" in toy.run(60, "true", "-n")
    toy.run(60)
    assert toy.published == "versions/60"
    assert "Nothing to be done" in toy.run(60, "true", "-n")
    assert not (toy.workspace.path / ".snakemake/backups").exists()


def test_a_version_that_somebody_deleted_is_made_again(toy: Toy):
    targets = ("export", "ckpt/sft")
    toy.run(30, "true", *targets)
    shutil.rmtree(toy.workspace.path / "ckpt/versions/30")
    alone = toy.run(30, "true", "-n", *targets, kept=False)
    assert "although it existed before" in alone  # else look whether this is still needed
    assert "Missing output files: ckpt/sft" in toy.run(30, "true", "-n", *targets)
    toy.run(30, "true", *targets)
    assert toy.published == "versions/30" and (toy.workspace.path / "ckpt/sft").is_dir()
    assert "Nothing to be done" in toy.run(30, "true", "-n", *targets)


@pytest.mark.parametrize("kept", [True, False])
def test_a_job_whose_end_no_snakemake_has_seen_is_still_to_run(toy: Toy, kept: bool):
    """It outlived the one that submitted it, which notes with what parameters a job was made.

    Snakemake alone takes it for finished, whatever they are later: then `finished` is still needed.
    """
    (toy.workspace.path / "ckpt/sft").unlink()
    shutil.rmtree(toy.workspace.path / ".snakemake/metadata")
    toy.run(30, "true", "--mode", "remote", kept=kept)  # as the Snakemake in a Slurm job
    assert toy.published == "versions/30"
    for steps in (30, 60):
        assert ("rule train" in toy.run(steps, "true", "-n", kept=kept)) == kept
    toy.run(30, kept=kept)
    assert "Nothing to be done" in toy.run(30, "true", "-n", kept=kept)
    assert ("rule train" in toy.run(60, "true", "-n", kept=kept)) == kept


def test_empty_directories_and_links_to_them_outlive_a_run_that_fails(tmp_path: Path):
    """A scratch may have settings of its own, such as the stripes of Lustre.

    Snakemake alone deletes it, and the directories above it. Where one is a link or a mount, it ends in a
    traceback, and without its hooks: then `cleanup_workdir` is still to be replaced.
    """
    toy, scratch = Toy(tmp_path / "work"), tmp_path / "scratch/me"
    scratch.mkdir(parents=True)
    (tmp_path / "work/ckpt").symlink_to(scratch)
    (tmp_path / "work/data").mkdir()
    for kept in (True, False):
        said = toy.run(30, "true", "ckpt/sft", "data/tokens", "--prioritize", "data/tokens", kept=kept)
        assert "Error in rule tokenize" in said and "rule train" not in said
        assert scratch.is_dir() and ("Traceback" in said) == (not kept)
        assert (tmp_path / "work/data").is_dir() or not kept


def test_snakemake_alone_copies_the_checkpoint(toy: Toy):
    """Why `keep_what_failed` is there. When this fails, look whether it is still needed."""
    (toy.workspace.path / "ckpt/sft/weights").write_text("terabytes")
    toy.run(60, "cp -r ../.snakemake/backups ../seen", kept=False)
    assert (toy.workspace.path / "seen/ckpt/sft/weights").read_text() == "terabytes"


@pytest.mark.parametrize("lost", ["record.json", "config.yaml", "iter_0000008", "iter_0000008/.metadata"])
def test_a_damaged_checkpoint_is_named_before_the_first_job_with_what_has_it_made_again(
    copy: Workspace, lost: str
):
    """The job that reads it would find that out, after hours of jobs before it."""
    changed = ("sft={optimizer: {learning_rate: 0.002}}",)
    published = copy.path / "ckpt/pretrain/focused"
    (published / lost).rename(copy.path / "lost")
    for options in (("-n",), ()):
        refused = copy.snakemake(*options, "ckpt/sft", config=changed)
        said = "error: ckpt/pretrain/focused, which rule sft reads, is damaged: ckpt/pretrain/focused"
        assert refused.status == 1 and said in refused.output, refused.output
    assert "Nothing to be done" in copy.snakemake("-n", "ckpt/sft").output  # nobody would read it
    assert copy.snakemake("-n", "report", "ckpt/pretrain/focused").jobs == {"report": 1}
    (command,) = re.findall("^    (rm -r .*)$", refused.output, re.MULTILINE)
    assert copy.run(*shlex.split(command)).status == 0
    assert copy.snakemake("-n", "ckpt/sft", config=changed).jobs == {"pretrain": 1, "sft": 1}

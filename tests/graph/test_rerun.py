"""What was changed for a job is seen: behind `ancient` files, and after a clock was ahead."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from tests.conftest import REPOSITORY, Result, Workspace

import pytest

# As filter_shard counts tokens by a tokenizer, whose change alone filters nothing again.
SNAKEFILE = f"""
import os
import sys
sys.path.insert(0, "{REPOSITORY}/scripts")
from snaketron.graph.snakemake import published, rerun
if config["asked"]:
    rerun.ask_each_job([os.getcwd()])
    published.keep_what_failed()
if "DIE" in os.environ:
    from snakemake.jobs import Job
    remove = Job.remove_existing_output

    async def remove_and_die(job):
        await remove(job)
        os.kill(os.getpid(), 9)

    Job.remove_existing_output = remove_and_die

rule tokenize:
    input: "filtered", "tokenizer"
    output: "tokens"
    shell: "cat {{input}} > {{output}}"

rule filter_shard:
    input: text="text", tokenizer=ancient("tokenizer")
    output: "filtered"
    log: "logs/filter"
    params: pattern=config["pattern"]
    shell: "test -z $FAIL && echo {{params.pattern}} > {{output}} && cat {{input.text}} >> {{output}}"

rule build_tokenizer:
    output: "tokenizer"
    params: size=config["size"]
    shell: "echo {{params.size}} > {{output}}"
"""


class Toy:
    def __init__(self, path: Path) -> None:
        self.workspace = Workspace(path)
        self.workspace.write("Snakefile", SNAKEFILE)
        self.text = self.workspace.write("text", "words")
        assert self.run("a", 1).status == 0

    def run(
        self, pattern: str, size: int, *options: str, asked: bool = True, fail: str = "", **variables: str
    ) -> Result:
        config = [f"pattern={pattern}", f"size={size}", f"asked={asked}"]
        command = ["snakemake", "--cores", "1", "--rerun-incomplete", *options, "--config", *config]
        return self.workspace.run(*command, environment={"FAIL": fail, **variables})

    def jobs(self, pattern: str, size: int, *, asked: bool = True) -> set[str]:
        return self.run(pattern, size, "-n", asked=asked).jobs.keys()


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """In a directory whose name a shell takes apart."""
    directory = tmp_path / "my work"
    directory.mkdir()
    return Toy(directory)


def test_a_filter_that_was_changed_together_with_the_tokenizer_filters_again(toy: Toy):
    assert toy.jobs("a", 2) == {"build_tokenizer", "tokenize"}
    assert toy.jobs("b", 1) == {"filter_shard", "tokenize"}
    assert toy.jobs("b", 2) == {"build_tokenizer", "filter_shard", "tokenize"}
    assert toy.run("b", 2).status == 0
    assert (toy.workspace.path / "tokens").read_text() == "b\nwords2\n"
    assert toy.jobs("b", 2) == set()
    toy.text.write_text("other words")
    assert toy.jobs("b", 3) == {"build_tokenizer", "filter_shard", "tokenize"}


def test_snakemake_alone_sees_the_filter_at_its_next_start(toy: Toy):
    """Why `ask_each_job` is there. When this fails, look whether it is still needed."""
    assert toy.jobs("b", 2, asked=False) == {"build_tokenizer", "tokenize"}
    assert toy.run("b", 2, asked=False).status == 0
    assert (toy.workspace.path / "tokens").read_text() == "a\nwords2\n"
    assert toy.jobs("b", 2, asked=False) == {"filter_shard", "tokenize"}


@pytest.mark.parametrize("asked", [True, False])
def test_a_changed_job_that_failed_is_still_to_run(toy: Toy, asked: bool):
    """Its output is gone, and tokens of the filter of before are there: finished, to Snakemake alone."""
    assert toy.run("b", 1, asked=asked, fail="1").status == 1
    assert not (toy.workspace.path / "filtered").exists() and (toy.workspace.path / "tokens").exists()
    assert toy.jobs("b", 1, asked=asked) == ({"filter_shard", "tokenize"} if asked else set())
    if asked:
        assert toy.run("b", 1).status == 0 and toy.jobs("b", 1) == set()


@pytest.mark.parametrize("asked", [True, False])
def test_a_job_that_ran_once_more_and_failed_is_still_to_run(toy: Toy, asked: bool):
    """Nothing was changed. Its output is gone, which Snakemake alone does not miss: tokens are there."""
    assert toy.run("a", 1, "-R", "filter_shard", asked=asked, fail="1").status == 1
    assert not (toy.workspace.path / "filtered").exists() and (toy.workspace.path / "tokens").exists()
    assert toy.jobs("a", 1, asked=asked) == ({"filter_shard", "tokenize"} if asked else set())
    if asked:
        assert toy.run("a", 1).status == 0 and toy.jobs("a", 1) == set()


@pytest.mark.parametrize("asked", [True, False])
def test_a_job_is_still_to_run_where_snakemake_was_killed_as_it_had_deleted_the_output(toy: Toy, asked: bool):
    """Alone it marks the output as incomplete after that."""
    assert toy.run("a", 1, "-R", "filter_shard", asked=asked, DIE="1").status == -9
    assert not (toy.workspace.path / "filtered").exists() and (toy.workspace.path / "tokens").exists()
    assert toy.jobs("a", 1, asked=asked) == ({"filter_shard", "tokenize"} if asked else set())


def test_a_job_that_failed_runs_again_without_a_profile_too(toy: Toy):
    """Snakemake refuses outputs marked as incomplete without --rerun-incomplete, which the profiles say."""
    assert toy.run("b", 1, fail="1").status == 1
    plain = toy.workspace.run(
        "snakemake", "--cores", "1", "-n", "--config", "pattern=b", "size=1", "asked=True"
    )
    assert plain.jobs.keys() == {"filter_shard", "tokenize"}, plain.output


def test_a_directory_that_cannot_be_made_is_said_in_a_line(toy: Toy):
    """The job is still to run."""
    logs = toy.workspace.path / "logs"
    shutil.rmtree(logs)
    logs.write_text("a file")
    found = toy.run("b", 1)
    assert found.status == 1 and "Traceback" not in found.output
    assert "filter_shard cannot write its files: [Errno 20] Not a directory: 'logs/filter'" in found.output
    logs.unlink()
    assert toy.jobs("b", 1) == {"filter_shard", "tokenize"}
    assert toy.run("b", 1).status == 0 and toy.jobs("b", 1) == set()


def test_outputs_of_a_clock_that_was_ahead_are_refused(toy: Toy):
    """A run ended after the filter. Its output is of today, and the tokens, made before, are of tomorrow."""
    toy.text.write_text("other words")
    assert toy.run("a", 1, "--until", "filter_shard").jobs == {"filter_shard": 1}
    tokens, tomorrow = toy.workspace.path / "tokens", time.time() + 86400
    os.utime(tokens, (tomorrow, tomorrow))
    assert toy.jobs("a", 1, asked=False) == set()  # Snakemake alone
    found = toy.run("a", 1, "-n")
    assert found.status == 1 and "tokens: of a time that is yet to come, in 24.0 hours." in found.output
    (command,) = (line for line in found.output.splitlines() if line.startswith("    find "))
    assert toy.workspace.run("bash", "-c", command).status == 0
    assert toy.jobs("a", 1) == {"tokenize"}
    soon = time.time() + 60  # the clock of a file server
    os.utime(tokens, (soon, soon))
    assert toy.run("a", 1, "-n").status == 0

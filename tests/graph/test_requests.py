"""Every request to Slurm, for the laptop's configuration and for the full size, as a dry-run shows it.

When a request changes on purpose, write the new text into tests/graph/requests/: a failure prints it.
"""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

from tests.conftest import Workspace

import pytest

BEGIN = "To be submitted to Slurm:"
TARGETS = ("ckpt/sft", "ckpt/lora_merged", "eval/sft.json", "hf/sft")
REQUESTS = Path(__file__).parent / "requests"


def plan(workspace: Workspace, *arguments: str) -> str:
    result = workspace.run("snakemake", "--profile", "profiles/slurm", "-n", *TARGETS, *arguments)
    assert result.status == 0, result.output[-3000:]
    return BEGIN + result.output.partition(BEGIN)[2]


@pytest.mark.parametrize(
    ("name", "arguments"), [("tiny", []), ("super", ["--configfile", "config/super.yaml"])]
)
def test_the_requests_are_those_written_down(workspace: Workspace, name: str, arguments: list[str]):
    found = plan(workspace, *arguments)
    assert found.splitlines() == (REQUESTS / f"{name}.txt").read_text().splitlines(), found


def test_the_page_about_slurm_shows_the_request_of_the_full_size():
    page = Path("docs/slurm.md").read_text().partition("It ends with:")[2]
    shown = page.strip("\n").partition("\n\n")[0]
    assert shown.startswith("    pretrain broad\n") and shown.count("\n") == 5
    written = (REQUESTS / "super.txt").read_text()
    assert f"\n\n{textwrap.indent(textwrap.dedent(shown), '  ')}\n\n" in written


def test_the_full_size_has_the_published_number_of_parameters(workspace: Workspace):
    """123,611,033,088 of NVIDIA's checkpoint, and 12.7 B active by its report."""
    assert "    123.6 B parameters, 12.8 B active a token\n" in plan(
        workspace, "--configfile", "config/super.yaml"
    )


def test_a_local_dry_run_asks_slurm_for_nothing(workspace: Workspace):
    result = workspace.snakemake("-n", "ckpt/sft")
    assert result.status == 0 and BEGIN not in result.output


def test_what_is_there_is_not_asked_for(copy: Workspace):
    """Nothing to do, nothing to submit; after a change, what depends on it."""
    overlay = ("--configfile", *copy.overlays)
    done = copy.run("snakemake", "--profile", "profiles/slurm", "-n", "ckpt/sft", *overlay)
    assert done.status == 0 and BEGIN not in done.output
    change = ("--config", "sft={train_iters: 4, tokens_per_second_per_gpu: 2.0}")
    rules = [line.strip() for line in plan(copy, *overlay, *change).splitlines() if line.startswith("  s")]
    assert rules == ["sft"]


def test_a_rule_with_threads_asks_for_them_in_a_dry_run_too(workspace: Workspace):
    """A dry-run of Snakemake's own has one core, so it told one CPU where a run asks for two or eight."""
    asked = plan(workspace, "--config", "pretrain_data={cpus_per_task: 8}").splitlines()
    cpus = {rule.strip(): options.rpartition("=")[2] for rule, options in itertools.pairwise(asked)}
    assert cpus["build_tokenizer"] == "2"
    assert cpus["a group of 8 tokenize_shard"] == cpus["a group of 4 tokenize_shard"] == "8"
    assert cpus["a group of 4 pack_sft"] == "1"

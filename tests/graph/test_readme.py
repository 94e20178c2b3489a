"""What the README shows is what the workflow does."""

from __future__ import annotations

import re

from tests.conftest import REPOSITORY, Workspace

import pytest
import yaml

README = (REPOSITORY / "README.md").read_text()


def graph_of_rules(workspace: Workspace) -> list[str]:
    """Lines `a --> b` of the rules, as Mermaid draws them."""
    drawn = workspace.run("snakemake", "--rulegraph", "mermaid-js").output
    names = dict(re.findall(r"^\s*(id\d+)\[(\w+)\]", drawn, re.MULTILINE))
    edges = re.findall(r"^\s*(id\d+) --> (id\d+)", drawn, re.MULTILINE)
    return sorted(f"{names[a]} --> {names[b]}" for a, b in edges)


def test_the_picture_is_the_graph(workspace: Workspace):
    (block,) = re.findall(r"```mermaid\n(.*?)```", README, re.DOTALL)
    shown = [line.strip() for line in block.splitlines()[1:]]
    expected = graph_of_rules(workspace)
    assert sorted(shown) == expected, "the picture should be:\n" + "\n".join(expected)


def commands(document: str) -> list[str]:
    """The snakemake commands that a document shows, without `uv run`."""
    return re.findall(r"^    uv run (snakemake .*)$", (REPOSITORY / document).read_text(), re.MULTILINE)


@pytest.fixture
def mine(workspace: Workspace) -> Workspace:
    """A workspace with the overlay of the README, and files like the ones that it names."""
    (overlay,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    workspace.write("mine.yaml", overlay)
    values = yaml.safe_load(overlay)
    for source in values["corpora"] + values["chats"]:
        for path in source["paths"]:
            workspace.write(path.replace("*", "part_0"), "")
    return workspace


def test_your_own_data_as_the_readme_shows_it(mine: Workspace):
    (command,) = [c for c in commands("README.md") if "mine.yaml" in c and " -n " in c]
    result = mine.run(*command.split())
    assert result.status == 0, result.output
    assert "tokens/notes" in result.output and "sft/train/support" in result.output
    assert "rule sample_corpus" not in result.output


SHOWN = [
    c for page in ("README.md", "docs/data.md", "docs/tuning.md", "docs/slurm.md") for c in commands(page)
]


@pytest.mark.parametrize("command", [c for c in SHOWN if "--report" not in c])
def test_every_command_is_one_that_snakemake_takes(mine: Workspace, command: str):
    """As dry-runs. The one with --report needs a finished run: tests/end_to_end/test_main_job.py."""
    result = mine.run(*command.split(), "-n")
    assert result.status == 0, result.output


def test_every_file_the_readme_names_is_there():
    names = re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"python (scripts/\S+\.py)", README)
    assert names
    assert [name for name in names if not (REPOSITORY / name).exists()] == []

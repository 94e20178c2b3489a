"""What the README shows is what the workflow does."""

from __future__ import annotations

import re

from tests.conftest import REPOSITORY, Workspace

import pytest
import yaml

README = (REPOSITORY / "README.md").read_text()


# What the boxes of the picture are called, and the files that the jobs of the demonstration know them by.
RAW = {
    "raw text": r"data/sample/(docs|code|packages|requests)",
    "raw chats": r"data/sample/(questions|tools)",
}


def drawn() -> tuple[dict[str, str], set[tuple[str, str]]]:
    """The picture of the README: the label of each box, and its arrows from box to box."""
    (block,) = re.findall(r"```mermaid\n(.*?)```", README, re.DOTALL)
    arrows = re.findall(r"^ +(\w+)\S*.* --> (\w+)", block, re.MULTILINE)
    return dict(re.findall(r'(\w+)\["(.*?)"\]', block)), set(arrows)


def made_from(workspace: Workspace, boxes: dict[str, str]) -> set[tuple[str, str]]:
    """From which box to which a job of the main job leads, by the files that it reads and writes."""
    patterns = {box: RAW.get(label, label.replace("{phase}", "[a-z]+")) for box, label in boxes.items()}

    def boxes_of(files: str) -> set[str]:
        return {box for box, pattern in patterns.items() if re.search(rf"(^|, ){pattern}(/|,|$)", files)}

    jobs = workspace.snakemake("-np", "ckpt/sft").output
    files = re.findall(r"^    input: (.*)\n    output: (.*?)(?: \(update\))?$", jobs, re.MULTILINE)
    pairs = {(a, b) for read, written in files for a in boxes_of(read) for b in boxes_of(written)}
    return {(a, b) for a, b in pairs if a != b}


def ways(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs of boxes of which one is reached from the other along arrows."""
    while longer := {(a, d) for a, b in arrows for c, d in arrows if b == c} - arrows:
        arrows = arrows | longer
    return arrows


def test_the_picture_is_the_graph(workspace: Workspace):
    """Each arrow is a job, and whatever a job reads leads to what it writes: over other boxes, perhaps."""
    boxes, arrows = drawn()
    jobs = made_from(workspace, boxes)
    assert arrows - jobs == set()
    assert jobs - ways(arrows) == set()
    assert {box for arrow in arrows for box in arrow} == set(boxes)


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
    assert "tokenize_shard notes" in result.output and "pack_sft support" in result.output
    assert "sample_corpus" not in result.output


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

"""What the README and the other pages show is what the workflow does."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import REPOSITORY, Workspace

import pytest
import yaml

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{page.name}" for page in (REPOSITORY / "docs").glob("*.md")),
)
TEXTS = {page: (REPOSITORY / page).read_text() for page in PAGES}
README = TEXTS["README.md"]


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
    """An arrow from box to box wherever a job of the main job reads files of one and writes the other."""
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


def commands(page: str) -> list[str]:
    """The snakemake commands that a page shows, without `uv run`, as dry-runs."""
    shown = re.findall(r"^    uv run (snakemake [^#\n]*)", TEXTS[page], re.MULTILINE)
    return [command.replace(" -n ", " ").strip() + " -n" for command in shown]


def overlays(page: str) -> dict[str, str]:
    """The configuration files that a page shows: blocks whose first line is the name as a comment."""
    blocks = re.findall(r"^```yaml\n# ([\w.]+\.yaml)(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL)
    return {name: f"#{rest}" for name, rest in blocks}


# Each command once, with the page that shows the files it names.
SHOWN = {
    (command, page if "--configfile" in command else "README.md"): None
    for page in PAGES
    for command in commands(page)
    if "--report" not in command  # needs a finished run: tests/end_to_end/test_main_job.py
}


def write_files(workspace: Workspace, page: str) -> None:
    """Write what the page tells to write, and text and conversations where its files look for them."""
    for name, text in (overlays("README.md") | overlays(page)).items():
        overlay = text.replace("/shared/", f"{workspace.path}/shared/")
        workspace.write(name, overlay)
        values = yaml.safe_load(overlay)
        for source in values.get("corpora", []) + values.get("chats", []):
            for path in source["paths"]:
                file = path.replace("*", "part_0") if Path(path).suffix else f"{path}/part_0.jsonl"
                workspace.write(file, "")
    for line in re.findall(r"^    (sed .*)$", TEXTS[page], re.MULTILINE):
        assert workspace.run("sh", "-c", line).status == 0


def test_your_own_data_as_the_readme_shows_it(workspace: Workspace):
    write_files(workspace, "README.md")
    command = "snakemake --profile profiles/local ckpt/sft --configfile mine.yaml -n"
    assert command in commands("README.md")
    result = workspace.run(*command.split())
    assert result.status == 0, result.output
    assert "tokenize_shard notes" in result.output and "pack_sft support" in result.output
    assert "sample_corpus" not in result.output


@pytest.mark.parametrize(("command", "page"), SHOWN)
def test_every_command_is_one_that_snakemake_takes(workspace: Workspace, command: str, page: str):
    write_files(workspace, page)
    result = workspace.run(*command.split())
    assert result.status == 0, result.output


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page in its addresses."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_heading_that_a_page_names_is_there(page: str):
    programs = re.findall(r"python ((?:scripts|tests)/[\w/]+\.py)", TEXTS[page])
    modules = [name.replace(".", "/") + ".py" for name in re.findall(r"python -m (tests[\w.]+)", TEXTS[page])]
    assert [name for name in programs + modules if not (REPOSITORY / name).exists()] == []
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", TEXTS[page]):
        name, _, heading = link.partition("#")
        file = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert file.exists(), link
        assert not heading or heading in anchors(file.read_text()), link

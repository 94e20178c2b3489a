"""The page of a run tells what the run was told, wherever that stood."""

from __future__ import annotations

import re

from tests.conftest import Workspace


def differences(page: str) -> dict[str, str]:
    """What the page says to differ from the defaults: each key with its value."""
    rows = re.findall(
        r'<th scope="row" class="word">([^<]*)</th><td[^>]*>[^<]*</td><td[^>]*>([^<]*)</td>',
        page.replace("<wbr>", ""),
    )
    return {key: value for key, value in rows if "." in key}


def test_the_page_has_what_the_command_line_and_the_environment_said(workspace: Workspace):
    """Both are in no file; the page said that all values were the defaults, and planned with those."""
    workspace.overlays = ("mine.yaml",)
    workspace.write("mine.yaml", "lora: {rank: 4}\n")
    told = {"SNAKETRON_SFT__WARMUP_ITERS": "3"}
    config = ("sft={train_iters: 77}", "pathvars={logs: told}")
    done = workspace.snakemake("data/sample/questions/record.json", config=config, environment=told)
    assert done.status == 0, done.output
    expected = {
        "lora.rank": "4",
        "sft.train_iters": "77",
        "sft.warmup_iters": "3",
        "pathvars.logs": "told",
    }
    done = workspace.run("python", "scripts/report.py", "--output", "page.html")
    assert done.status == 0, done.output
    page = (workspace.path / "page.html").read_text()
    assert differences(page).items() >= expected.items()
    assert "sample_chat is not complete, 1 of 2 jobs are done." in page  # by told/sample_chat/questions.log
    # Another run is told otherwise.
    workspace.overlays = ()
    workspace.run("snakemake", "--profile", "profiles/local", "report")
    page = (workspace.path / "report/report.html").read_text()
    assert "all values are the defaults (config/config.yaml alone)" in page and differences(page) == {}

"""The data report as a page that needs no other file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from snaketron import files
from snaketron.report.figures import FIGURES


class Page(HTMLParser):
    """Collects what a page shows, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.drawings: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "svg":
            self.drawings.append(dict(attributes)["aria-label"] or "")
        if tag not in ("meta", "wbr"):  # which have no end
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_escapes_what_the_data_says(records, run_script, tmp_path: Path):
    status, stderr = run_script("data_report", "--records", *records, "--output", tmp_path / "report")
    assert status == 0, stderr
    text = (tmp_path / "report/report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and "invalid JSON <b>" in page.text and "<b>" not in text
    assert not re.search(r"http|<script|<link|url\((?!#)", text)
    assert len(page.drawings) == len(FIGURES) and all(page.drawings)
    record = files.read_json(tmp_path / "report/record.json")
    drawn = {f"{name}.svg" for name in FIGURES}
    assert {Path(o["path"]).name for o in record["outputs"]} == {"report.md", "report.html"} | drawn

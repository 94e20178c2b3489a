"""The page of a run in Debian's Chromium: nothing is asked for or sticks out, and all can be read."""

from __future__ import annotations

import itertools
import os
from itertools import pairwise
from pathlib import Path

from snaketron import files
from snaketron.config.data import SPLITS
from snaketron.lineage.diff import changed
from snaketron.report.overview import missing
from snaketron.report.report import report
from snaketron.report.runs import Run, read_run
from tests.chromium import Page, chromium, find
from tests.conftest import REPOSITORY
from tests.unit.report.conftest import packs, shard, share

import orjson
import pytest
import yaml

WIDTHS = (360, 768, 1280)
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
# How strongly each text differs from what it stands on, by WCAG 2: those below 4.5.
FAINT = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    const parts = [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return a < 255 ? null : 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const below = element => {
    if (element instanceof SVGElement) {
      const box = element.getBoundingClientRect();
      const places = [box.x + box.width / 2, box.y + box.height / 2];
      for (const shape of document.elementsFromPoint(...places)) {
        const found = shape.matches('path, rect') ? getComputedStyle(shape).fill : 'none';
        if (found !== 'none') return light(found);
      }
    }
    for (let at = element; at; at = at.parentElement) {
      const found = light(getComputedStyle(at).backgroundColor);
      if (found !== null) return found;
    }
  };
  const faint = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let number = 0;
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, style = getComputedStyle(element);
    if (!texts.currentNode.data.trim() || style.visibility === 'hidden') continue;
    const ink = light(element instanceof SVGElement ? style.fill : style.color), paper = below(element);
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    number += 1;
    if (!(contrast >= 4.5)) faint.push([texts.currentNode.data.trim(), contrast]);
  }
  return [number, faint];
})()"""
# Texts of drawings that stick out of them, where they are cut off.
CUT = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const all = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect(), [x, y] = [all.x - 1, all.y - 1];
    return box.left < x || box.right > x + all.width + 2 || box.top < y || box.bottom > y + all.height + 2;
  }).map(text => text.textContent);
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """One for all pages; starting it takes a second."""
    if not find():
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("there is no Chromium (Debian: chromium; .ci/run installs it)")
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def read(root: Path, name: str) -> Run:
    run = read_run(root, {"data": "."}, None, name=name, alone=True)
    run.changes = changed({"sft": {"seed": 1}}, {"sft": {"seed": 2}})
    return run


@pytest.fixture
def failed(records, training, job, tmp_path: Path) -> Run:
    """Data, a finished phase, and an SFT that failed."""
    training("pretrain/broad")
    training("sft", steps=12, outcome="failed", error="rank 3: out of memory " + "/a/long/path" * 20)
    job("tokenize_shard/docs/a", seconds=2.5)
    job("pretrain/broad", seconds=1900)
    job("sft", said="error: out of memory")
    return read(tmp_path, "failed")


def write(path: Path, *runs: Run) -> Path:
    path.write_text(report(runs), encoding="utf-8")
    return path


def check(browser: Page, page: Path) -> None:
    """Every promise about any page."""
    for width in WIDTHS:
        for dark in (False, True):
            browser.open(page, width, height=30_000, dark=dark)  # so high that all is in sight
            browser.evaluate(OPEN_ALL)
            assert browser.complaints() == []
            assert browser.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, width
            number, faint = browser.evaluate(FAINT)
            assert number > 100 and faint == []
            assert browser.evaluate(CUT) == []
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    unnamed = "[...document.querySelectorAll('svg')].filter(s => !s.getAttribute('aria-label')).length"
    assert browser.evaluate(unnamed) == 0
    poor = (
        "[...document.querySelectorAll('table')].filter(t => !t.caption || !t.querySelector('th[scope=col]'))"
    )
    assert browser.evaluate(f"{poor}.length") == 0
    names = browser.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(names) == len(set(names))


def test_the_page_of_a_failed_run(browser: Page, failed: Run, tmp_path: Path):
    page = write(tmp_path / "report.html", failed)
    text = page.read_text()
    assert all(said.partition(":")[0] in text for said in missing(failed))
    assert "step 7: the gradient norm is 9 times that of before" in text and "least used from 0.5" in text
    assert "<b>40</b>" not in text and "answer &lt;b&gt;40&lt;/b&gt;" in text
    assert len(text.encode()) < 500_000
    check(browser, page)
    # The first key leads to the content, and a table that is wider than the window can be reached.
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert browser.evaluate("document.querySelectorAll('.wide:not([tabindex=\"0\"])').length") == 0


def test_the_names_of_the_recipe_are_whole(browser: Page, make, training, tmp_path: Path):
    """30 corpora of up to 61 letters: names and numbers were cut off, and panels wrote over each other."""
    recipe = yaml.safe_load((REPOSITORY / "config/super.yaml").read_text())
    names = [one["name"] for one in recipe["corpora"]]
    counts = {"length_histogram": {"4": 90, "1024": 1}, "dropped": {"no " + "text " * 9: 3}}
    shards = [
        make(f"tokens/{name}.json", "tokens", counts=shard(7**n, n, n, **counts), settings={"corpus": name})
        for name, n in zip(names, itertools.cycle(range(2, 13)), strict=False)
    ]
    for phase in recipe["pretrain"]["phases"][:3]:
        blend = tmp_path / f"pretrain/{phase['name']}/blend.json"
        total = sum(one["weight"] for one in phase["blend"])
        mix = [share(one["corpus"], one["weight"] / total, 9, 9, 1 / 30) for one in phase["blend"]]
        files.write_json(blend, {"train": {"corpora": mix}})
        output = {"name": "blend.json", "path": str(blend), "sha256": files.sha256(blend)}
        record = f"pretrain/{phase['name']}/record.json"
        make(record, "blend", *shards, counts={"repeated": {}}, name=phase["name"], outputs=[output])
    for source in recipe["chats"]:
        told = {"source": source["name"], "pack_size": 4096}
        splits = {split: packs(4, 300, 90, 20) for split in SPLITS}
        found = {"splits": splits, "needed_pack_size": {"8": 5}}
        make(f"sft/{source['name']}/a.json", "pack_sft", counts=found, settings=told)
    directory = training("pretrain/broad")
    losses = {name: {"loss": 5.0 - n / 10, "trained_tokens": 100 + n} for n, name in enumerate(names)}
    lines = [{"iteration": step, "loss": 5.0 / step, "sources": losses} for step in (1, 2, 40)]
    (directory / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    page = write(tmp_path / "report.html", read(tmp_path, "recipe"))
    check(browser, page)
    browser.open(page, 360)
    drawn = browser.evaluate("[...document.querySelectorAll('svg text')].map(text => text.textContent)")
    assert all(drawn.count(name) >= 2 for name in names)  # tokens and lengths
    assert "Loss by corpus, training: 6 of 30" in page.read_text()
    assert drawn.count(names[-1]) == 3 and drawn.count(names[23]) == 2  # the six that most was trained on


def test_two_runs_on_one_page(browser: Page, failed: Run, training, tmp_path: Path):
    training("pretrain/broad", root=tmp_path / "other", settings={"seq_length": 512})
    page = write(tmp_path / "report.html", failed, read(tmp_path / "other", "other"))
    check(browser, page)
    rows = "[...document.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent))"
    cells = browser.evaluate(rows)
    assert ["pretrain/broad", "seq_length", "256", "512"] in cells
    assert [row[:3] for row in cells if row[0] == "pretrain/broad"][:2] == [
        ["pretrain/broad", "failed", "✓ finished"],
        ["pretrain/broad", "other", "✓ finished"],
    ]


def test_a_page_of_nothing(browser: Page, tmp_path: Path):
    page = write(tmp_path / "report.html", read(tmp_path, "empty"))
    browser.open(page, 360)
    assert browser.complaints() == []
    assert "No job has left a log" in browser.evaluate("document.body.innerText")

"""The data report adds up records written by hand."""

from __future__ import annotations

import base64
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from snaketron import files
from snaketron.log import UserError
from snaketron.report import figures, sections

import pytest

SPLITS = ("train", "valid", "test")


@pytest.fixture
def make(tmp_path: Path):
    """make(path, kind, *inputs, counts=..., ...): write a record; returns how a later one lists it."""

    def write(
        path: str,
        kind: str,
        *inputs: dict[str, Any],
        counts: dict[str, Any],
        settings: dict[str, Any] | None = None,
        name: str = "",
        outputs: list[dict[str, Any]] | None = None,
        seconds: float = 1.0,
    ) -> dict[str, Any]:
        value = {"kind": kind, "name": name or path, "seconds": seconds, "settings": settings or {}}
        value |= {"inputs": list(inputs), "outputs": outputs or [], "counts": counts}
        files.write_json(tmp_path / path, value)
        return {"path": str(tmp_path / path), "sha256": files.sha256(tmp_path / path)}

    return write


def shard(train: int, valid: int, test: int, **counts: Any) -> dict[str, Any]:
    """Counts of a tokenized shard: tokens by split, of ten tokens a document and four bytes a token."""
    splits = {
        split: {"documents": tokens // 10, "tokens": tokens, "bytes": 4 * tokens}
        for split, tokens in zip(SPLITS, (train, valid, test), strict=True)
    }
    return {"documents": 100, "dropped": {"empty": 0}} | splits | counts


def packs(number: int, tokens: int, trained: int, packed: int, **dropped: int) -> dict[str, Any]:
    counts = {"packs": number, "tokens": tokens, "trained_tokens": trained, "packed": packed}
    return counts | {"dropped": dropped, "length_histogram": {"4": packed} if packed else {}}


def share(corpus: str, asked: float, taken: int, tokens: int, present: float) -> dict[str, Any]:
    return {
        "corpus": corpus,
        "asked": asked,
        "share": asked,
        "present": present,
        "documents": 1,
        "tokens": tokens,
        "taken": taken,
        "epochs": taken / tokens,
        "empty_shards": 0,
    }


@pytest.fixture
def run(make, tmp_path: Path) -> list[Path]:
    """Two shards of docs, one of them curated, one of code; a phase with an index, one without; chats."""
    bad = {"file": "raw/b.jsonl", "row": 7, "reason": "bad row", "detail": "invalid\n  JSON <b>"}
    curated_file = tmp_path / "curated/docs/b.parquet"
    curated_file.parent.mkdir(parents=True)
    curated_file.write_bytes(b"curated")
    output = {"path": str(curated_file), "sha256": files.sha256(curated_file)}
    example = {"file": "raw/b.jsonl", "row": 3, "text": "lorem " * 40}
    curated_counts = {
        "documents": 50,
        "tokens": 900,
        "kept": {"documents": 40, "tokens": 720},
        "removed": {
            "gopher_quality: too_short": {"documents": 8, "tokens": 120, "examples": [example] * 5},
            "exact duplicate": {"documents": 2, "tokens": 60, "examples": []},
        },
        "changed": {"pii": {"documents": 4, "tokens": -3}},
        "rows": 53,
        "dropped": {"bad row": 3},
        "dropped_rows": [bad],
    }
    make(
        "curated/docs/b.json", "curated", counts=curated_counts, name="docs/b", outputs=[output], seconds=4.5
    )
    docs, code = {"corpus": "docs"}, {"corpus": "code"}
    histogram = {"4": 90, "8": 9, "1024": 1}
    more = {"dropped": {"empty": 2}, "cut": 3, "checked": 20, "encoder": "fastokens", "fallback": None}
    a = make(
        "docs/a.json", "tokens", counts=shard(1000, 100, 0, length_histogram=histogram, **more), settings=docs
    )
    b = make(
        "docs/b.json",
        "tokens",
        output,
        counts=shard(3000, 0, 0, encoder="tokenizers", fallback="Unigram is not supported", replaced=5),
        settings=docs,
        name="docs/b",
        seconds=2.5,
    )
    c = make("code/a.json", "tokens", counts=shard(1000, 50, 50, encoder="fastokens"), settings=code)

    corpora = [share("docs", 0.25, 2000, 4000, 0.8), share("code", 0.75, 6000, 1000, 0.2)]
    records = []
    for phase in ("broad", "focused"):
        blend = tmp_path / "pretrain" / phase / "blend.json"
        files.write_json(blend, {"train": {"corpora": corpora}})
        output = {"path": str(blend), "sha256": files.sha256(blend)}
        counts = {"repeated": {"code": 6.0} if phase == "broad" else {}}
        make(
            f"pretrain/{phase}/record.json", "blend", *(a, b, c), counts=counts, name=phase, outputs=[output]
        )
        if phase == "broad":
            counts = {"train": {"samples": 10, "corpora": {"docs": 3, "code": 7}}}
            settings = {"seq_length": 800}
            make("pretrain/broad/index.json", "index", output, counts=counts, settings=settings, name=phase)
            records.append(tmp_path / "pretrain/broad/index.json")
        else:
            records.append(tmp_path / "pretrain/focused/record.json")

    tools = {"source": "tools", "pack_size": 100}
    rendered = tmp_path / "chat/tools/a.parquet"
    rendered.parent.mkdir(parents=True)
    rendered.write_bytes(b"rendered")
    output = {"path": str(rendered), "sha256": files.sha256(rendered)}
    counts = {"rows": 30, "dropped": {"not_rendered": 4}, "dropped_rows": []}
    make("chat/tools/a.json", "render_chat", counts=counts, settings=tools, outputs=[output])
    splits = {"train": packs(4, 300, 90, 20, **{"longer than a pack": 1}), "valid": packs(1, 20, 6, 5)}
    splits["test"] = packs(0, 0, 0, 0)
    packed = make("sft/tools/a.json", "pack_sft", output, counts={"splits": splits}, settings=tools)
    make("sft/record.json", "blend_sft", packed, counts={}, name="sft")
    return [*records, tmp_path / "sft/record.json"]


# ---------------------------------------------------------------------------------------- collecting


def test_shards_of_a_corpus_are_added_up(run):
    docs = sections.collect(run).texts["docs"]
    assert (docs.shards, docs.documents, docs.cut, docs.checked, docs.replaced) == (2, 200, 3, 20, 5)
    assert docs.tokens == {"train": 4000, "valid": 100, "test": 0}
    assert docs.kept == {"train": 400, "valid": 10, "test": 0}
    assert docs.bytes["train"] == 16000
    assert docs.encoders == {"fastokens": 1, "tokenizers": 1}
    assert docs.lengths == {4: 90, 8: 9, 1024: 1}


def test_a_shard_that_two_phases_share_counts_once(run):
    data = sections.collect(run)
    assert data.texts["code"].shards == 1 and data.seconds["tokens"] == [1.0, 1.0, 2.5]
    assert len(data.seconds["blend"]) == 2


def test_what_was_removed_is_counted_by_source_step_and_reason(run):
    removed = {
        key: (r.documents, r.tokens, len(r.examples)) for key, r in sections.collect(run).removed.items()
    }
    assert removed == {
        ("docs", "curate", "gopher quality: too short"): (8, 120, 3),
        ("docs", "curate", "exact duplicate"): (2, 60, 0),
        ("docs", "read", "bad row"): (3, None, 1),
        ("docs", "tokenize", "empty"): (2, None, 0),
        ("tools", "render", "not rendered"): (4, None, 0),
        ("tools", "pack", "longer than a pack"): (1, None, 0),
    }


def test_the_mix_is_that_of_the_index_where_there_is_one(run):
    """The index of broad took 3 and 7 of 10 samples of 800 tokens; focused is planned at 2,000 and 6,000."""
    data = sections.collect(run)
    assert data.indexed == {"broad"}
    shares = {
        phase: [(s.corpus, s.asked, s.realised, s.taken) for s in data.mixes[phase]] for phase in data.mixes
    }
    assert shares == {
        "broad": [("docs", 0.25, 0.3, 2400), ("code", 0.75, 0.7, 5600)],
        "focused": [("docs", 0.25, 0.25, 2000), ("code", 0.75, 0.75, 6000)],
    }
    assert [(s.epochs, s.repeated) for s in data.mixes["broad"]] == [(0.6, False), (5.6, True)]


def test_packing_is_what_fills_the_packs(run):
    """320 tokens in 5 packs of 100, 96 of them trained."""
    tools = sections.collect(run).chats["tools"]
    assert (tools.rows, tools.conversations, tools.packs, tools.room) == (30, 25, 5, 500)
    assert (tools.efficiency, tools.trained_share) == (0.64, 0.3)
    assert sections.Chats().efficiency == sections.Chats().trained_share == 0.0


def test_a_record_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"record.json: no such record"):
        sections.collect([tmp_path / "record.json"])


@pytest.mark.parametrize(
    ("share_below", "bound"), [(0.5, 8), (0.9, 8), (0.91, 16), (0.99, 16), (0.995, 2048), (1.0, 2048)]
)
def test_a_share_of_the_lengths_is_below_a_power_of_two(share_below, bound):
    """90 of 100 are in [4, 8), 9 in [8, 16), one in [1024, 2048)."""
    assert sections._quantile(Counter({4: 90, 8: 9, 1024: 1}), share_below) == bound


# ------------------------------------------------------------------------------------------- writing


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def cells(text: str, name: str) -> list[str]:
    """The cells after `name` in a Markdown table."""
    (line,) = [line for line in text.splitlines() if re.match(rf"\| {re.escape(name)} +\|", line)]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_text_has_every_table(run):
    text = sections.markdown(sections.sections(sections.collect(run)))
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "Text",
        "Curation",
        "Lengths",
        "Mix",
        "Removed",
        "Conversations",
        "Time",
    ]
    part = section(text, "Text")
    assert cells(part, "docs") == ["2", "200", "400", "10", "0", "0.0", "4,000", "100", "0", "4.00"]
    assert "Encoded by fastokens for 2 shards, tokenizers for 1 shards. 20 documents were compared" in part
    assert "- `docs/b was encoded by tokenizers: Unigram is not supported`" in part
    assert cells(section(text, "Curation"), "docs") == ["50", "40", "900", "720", "80.0%", "80.0%", "4"]
    assert cells(section(text, "Lengths"), "docs") == ["100", "8", "8", "16", "2,048"]
    part = section(text, "Mix")
    assert cells(part, "broad: code") == ["75.00%", "70.00%", "20.00%", "5,600", "1,000", "5.60 !"]
    assert "Planned, not counted: focused." in part
    assert "- `broad goes through code 5.60 times: above pretrain_data.max_epochs`" in part
    part = section(text, "Removed")
    assert "20 rows, documents and conversations were left out." in part
    assert cells(part, "docs: curate: gopher quality: too short") == ["8", "120"]
    assert cells(part, "docs: read: bad row") == ["3", "-"]
    assert "- `docs: read: bad row: raw/b.jsonl:7: invalid JSON <b>`" in part
    assert f"raw/b.jsonl:3: {('lorem ' * 40)[:100]}…`" in part
    assert cells(section(text, "Conversations"), "tools") == [
        *("1", "30", "25", "5", "320", "96", "30.0%", "64.0%")
    ]
    assert cells(section(text, "Time"), "tokenize") == ["3", "4.5", "2.5"]


def test_what_no_record_is_about_is_left_out(run):
    """The records of one phase alone: no conversations, and nothing of the chat source."""
    parts = sections.sections(sections.collect(run[:1]))
    assert [part.title for part in parts] == ["Text", "Curation", "Lengths", "Mix", "Removed", "Time"]
    parts = sections.sections(sections.collect(run[-1:]))
    assert [part.title for part in parts] == ["Lengths", "Removed", "Conversations", "Time"]
    assert sections.sections(sections.Data()) == []


class Page(HTMLParser):
    """Collects what a page shows, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attributes)["src"] or "")
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_escapes_what_the_data_says(run, run_script, tmp_path: Path):
    status, stderr = run_script("data_report", "--records", *run, "--output", tmp_path / "report")
    assert status == 0, stderr
    text = (tmp_path / "report/report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and "invalid JSON <b>" in page.text and "<b>" not in text
    assert not re.search(r"""(src|href)=["']?http""", text)
    images = [base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")) for source in page.images]
    drawn = [tmp_path / f"report/{name}.svg" for name in ("tokens", "lengths", "mix", "removed", "packing")]
    assert images == [path.read_bytes() for path in drawn]
    record = files.read_json(tmp_path / "report/record.json")
    assert {Path(o["path"]).name for o in record["outputs"]} == {
        *("report.md", "report.html"),
        *(path.name for path in drawn),
    }


def test_the_figures_are_svg_and_the_same_each_time(run):
    data = sections.collect(run)
    for draw in figures.FIGURES.values():
        svg = draw(data)
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert draw(sections.collect(run)) == svg


def test_every_figure_is_there_without_data():
    for draw in figures.FIGURES.values():
        assert ElementTree.fromstring(draw(sections.Data())).tag.endswith("svg")


def test_more_corpora_than_colours_are_drawn():
    data = sections.Data()
    for i in range(20):
        data.texts[f"c{i}"] = sections.Text(tokens=Counter(train=10**i), lengths=Counter({1 << i: 1}))
    shares = [sections.Share(f"c{i}", 0.05, 0.05, 0.05, 1, 1, 1.0, False) for i in range(20)]
    data.mixes["broad"] = shares
    for name in ("tokens", "lengths", "mix"):
        assert ElementTree.fromstring(figures.FIGURES[name](data)).tag.endswith("svg")


@pytest.mark.parametrize(
    ("value", "text"),
    [(5, "5"), (999, "999"), (1200, "1.2 k"), (2_500_000, "2.5 M"), (3e9, "3 G"), (1e12, "1 T")],
)
def test_numbers_of_an_axis(value, text):
    assert figures.short(value) == text


def test_powers_of_two_of_an_axis():
    assert [figures.binary(1 << k) for k in (0, 9, 10, 15, 20, 31)] == [
        "1",
        "512",
        "1 Ki",
        "32 Ki",
        "1 Mi",
        "2 Gi",
    ]

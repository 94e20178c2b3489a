"""The tables of the data report, about records written by hand."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from snaketron.config.data import SPLITS
from snaketron.report.collect import Data, collect
from snaketron.report.data_report import markdown
from snaketron.report.sections import _quantile, sections
from snaketron.report.summary import _text
from tests.unit.report.conftest import packs, shard

import pytest


@pytest.mark.parametrize(
    ("share_below", "bound"), [(0.5, 8), (0.9, 8), (0.91, 16), (0.99, 16), (0.995, 2048), (1.0, 2048)]
)
def test_a_share_of_the_lengths_is_below_a_power_of_two(share_below, bound):
    """90 of 100 are in [4, 8), 9 in [8, 16), one in [1024, 2048)."""
    assert _quantile(Counter({4: 90, 8: 9, 1024: 1}), share_below) == bound


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def cells(text: str, name: str) -> list[str]:
    """The cells after `name` in a Markdown table."""
    (line,) = [line for line in text.splitlines() if re.match(rf"\| {re.escape(name)} +\|", line)]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_text_has_every_table(records):
    text = markdown(sections(collect(records)))
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == [
        "Text",
        "Curation",
        "Lengths",
        "Mix",
        "Removed",
        "Conversations",
        "Pack sizes",
        "Time",
    ]
    part = section(text, "Text")
    assert cells(part, "docs") == ["2", "213", "400", "10", "0", "0.0", "4,000", "100", "0", "4.00"]
    assert "Encoded by fastokens for 2 shards, tokenizers for 1 shard. 20 documents were compared" in part
    assert "7 documents were not valid Unicode" in part  # 5 read by shards, and 2 by the curation
    assert "- `docs/b was encoded by tokenizers: Unigram is not supported`" in part
    assert cells(section(text, "Curation"), "docs") == ["50", "40", "900", "720", "80.0%", "80.0%", "4"]
    assert cells(section(text, "Lengths"), "docs") == ["100", "8", "8", "16", "2,048"]
    part = section(text, "Mix")
    assert cells(part, "broad: code") == ["75.00%", "70.00%", "20.00%", "5,600", "1,000", "5.60 !"]
    assert "Planned, not counted: focused." in part
    assert "- `broad goes through code 5.60 times: above pretrain_data.max_epochs`" in part
    part = section(text, "Removed")
    assert "20 rows, documents and conversations were left out." in part
    assert cells(part, "docs: curate: gopher_quality: too_short") == ["8", "120"]
    assert cells(part, "docs: read: bad row") == ["3", "-"]
    assert "- `docs: read: bad row: raw/b.jsonl:7: invalid JSON <b>`" in part
    assert f"raw/b.jsonl:3: {('lorem ' * 40)[:100]}…`" in part
    assert cells(section(text, "Conversations"), "tools") == [
        *("1", "30", "25", "5", "320", "96", "30.0%", "64.0%")
    ]
    part = section(text, "Pack sizes")  # 5 of 26 need 8 tokens, 20 more 16, and the one left out 128
    assert cells(part, "chat source") == ["16", "32", "64", "128"]
    assert cells(part, "tools") == ["96.2%", "96.2%", "96.2%", "100.0%"]
    assert "- `tools: packs of 100 tokens leave out 1 of 26 conversations (3.8%)`" in part
    assert cells(section(text, "Lengths"), "tools") == ["26", "16", "16", "128", "128"]
    assert cells(section(text, "Time"), "tokenize_shard") == ["3", "4.5", "2.5"]


def test_rows_and_bytes_of_what_was_made_elsewhere_are_not_known(make, tmp_path: Path):
    """They were 0, as if nothing had been read."""
    counts: dict[str, Any] = shard(400, 10, 0)
    splits = {split: packs(1, 40, 20, 4) for split in SPLITS}
    made = [
        make("web/a.json", "registered_tokens", counts=counts, settings={"corpus": "web"}),
        make(
            "help/a.json",
            "registered_packs",
            counts={"splits": splits},
            settings={"source": "help", "pack_size": 100},
        ),
    ]
    data = collect([Path(record["path"]) for record in made])
    text = markdown(sections(data))
    assert cells(section(text, "Text"), "web") == ["1", "-", "40", "1", "0", "-", "400", "10", "0", "-"]
    chats = cells(section(text, "Conversations"), "help")
    assert chats == ["1", "-", "12", "3", "120", "60", "50.0%", "40.0%"]
    assert cells(_text(data), "web") == ["1", "-", "-", "400", "10", "0"]  # in the summary of a training


def test_what_no_record_is_about_is_left_out(records):
    """The records of one phase alone: no conversations, and nothing of the chat source."""
    parts = sections(collect(records[:1]))
    assert [part.title for part in parts] == ["Text", "Curation", "Lengths", "Mix", "Removed", "Time"]
    parts = sections(collect(records[-1:]))
    assert [part.title for part in parts] == ["Lengths", "Removed", "Conversations", "Pack sizes", "Time"]
    assert sections(Data()) == []

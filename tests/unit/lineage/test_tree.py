"""The tree as text, Mermaid, JSON and OpenLineage."""

from __future__ import annotations

from pathlib import Path

from snaketron.lineage import formats, tree
from snaketron.lineage.catalogue import scan
from tests.unit.lineage.conftest import tokens, write

from rich.console import Console


def text(path: str) -> list[str]:
    catalogue = scan(Path.cwd())
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(tree.show(catalogue, catalogue.about(Path(path))))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_tree_has_a_branch_for_each_kind_of_input(lineage: Path):
    lines = [line for line in text("ckpt/sft") if "made on" not in line and "CPU" not in line]
    lines = [
        line for line in lines if "code " not in line and "cpu seconds" not in line and "python" not in line
    ]
    assert lines == [
        "checkpoint sft  ckpt/versions/sft-0b",
        "├── blend: blend one  data/pretrain/one/blend.json",
        "│   ├── records: tokens docs, 2 shards  data/tokens/docs/train/a.bin, data/tokens/docs/train/b.bin",
        "│   │   ├── tokenizer: tokenizer  data/tokenizer/tokenizer.json",
        "│   │   │   └── text: raw file  raw/a.jsonl",
        "│   │   └── text: 2 raw files  raw/a.jsonl, raw/b.jsonl",
        "│   └── tokenizer: tokenizer (see above)  data/tokenizer/tokenizer.json",
        "└── base: checkpoint pretrain/one  ckpt/versions/pretrain_one-0a",
        "    └── blend: blend one (see above)  data/pretrain/one/blend.json",
    ]


def test_the_tree_says_how_the_artifact_was_made(lineage: Path):
    lines = " ".join(text("ckpt/sft")[1:6])
    assert "made on 20" in lines and "cpu seconds" in lines and "GB" in lines and "megatron-core" in lines


def test_the_tree_says_what_is_not_here_any_more(lineage: Path):
    Path("raw/b.jsonl").unlink()
    assert [line for line in text("ckpt/sft") if "not here" in line] == [
        "│   │       └── 1 of them: not here any more"
    ]
    write("raw/a.jsonl", '{"text": "another"}\n')
    tokens("a", "raw/a.jsonl")
    (line,) = (line for line in text("ckpt/sft") if "made again since, on 20" in line)
    assert line.endswith("its origin is not recorded")


def test_the_diagram_draws_each_branch_once(lineage: Path):
    catalogue = scan(lineage)
    lines = tree.mermaid(catalogue, catalogue.about(Path("ckpt/sft"))).splitlines()
    assert lines[0] == "flowchart LR"
    nodes = [line for line in lines if "-->" not in line][1:]
    assert len(nodes) == 7  # 2 trainings, blend, shards, tokenizer, the raw files of each of the last two
    assert '  n0["checkpoint sft<br>ckpt/versions/sft#45;0b"]'.replace("#45;", "-") in nodes
    assert sum("-->|blend|" in line for line in lines) == 2
    assert "-->|base| n0" in lines[-1]


def test_a_name_is_quoted_in_the_diagram():
    assert tree._quoted('x"|[y]') == "x#34;#124;#91;y#93;"


def test_json_has_all_records_and_what_made_their_inputs(lineage: Path):
    catalogue = scan(lineage)
    value = formats.as_json(catalogue, catalogue.about(Path("ckpt/sft")))
    assert [Path(record["record"]).name for record in value["records"]] == [
        *("record.json", "a.json", "b.json", "record.json", "record.json", "record.json")
    ]
    last = value["records"][-1]
    assert value["artifact"] == last["record"] and last["settings"] == {"seed": 1}
    made_by = {entry["name"]: entry["made_by"] for entry in last["inputs"]}
    assert made_by == {
        "blend": f"{lineage}/data/pretrain/one/record.json",
        "base": f"{lineage}/ckpt/versions/pretrain_one-0a/record.json",
    }
    assert value["records"][0]["inputs"][0]["made_by"] is None


def test_the_events_of_openlineage_name_the_same_data_sets(lineage: Path):
    catalogue = scan(lineage)
    events = formats.openlineage(catalogue, catalogue.about(Path("ckpt/sft")))
    assert [event["job"]["name"] for event in events] == [
        *("tokenizer/tokenizer", "tokens/docs/a", "tokens/docs/b", "blend/one"),
        *("checkpoint/pretrain/one", "checkpoint/sft"),
    ]
    assert {event["eventType"] for event in events} == {"COMPLETE"}
    assert len({event["run"]["runId"] for event in events}) == 6
    made: set[tuple[str, str]] = set()
    for event in events:  # every input that is not raw was an output of an event before
        names = {(s["name"], s["facets"]["version"]["datasetVersion"]) for s in event["inputs"]}
        assert {name for name, _ in names - made} <= {"raw/a.jsonl", "raw/b.jsonl"}
        made |= {(s["name"], s["facets"]["version"]["datasetVersion"]) for s in event["outputs"]}
    assert [s["name"] for s in events[-1]["inputs"]] == [
        "data/pretrain/one/blend.json",
        "ckpt/versions/pretrain_one-0a/iter_0000010/weights",
    ]

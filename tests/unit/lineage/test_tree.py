"""The tree as text, Mermaid, JSON and OpenLineage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal
from uuid import UUID

from snaketron.files import write_json
from snaketron.lineage import formats, tree
from snaketron.lineage.catalogue import scan
from tests.unit.lineage.conftest import job, prune, tokens, write

import pytest
from pydantic import AnyUrl, AwareDatetime, BaseModel, Field
from rich.console import Console


def text(path: str, root: str = ".") -> list[str]:
    catalogue = scan(Path(root))
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


def test_a_branch_names_the_files_that_were_used_of_a_job_that_made_several(lineage: Path):
    made = {f"part_{i}": f"data/sample/docs/part_{i}.jsonl" for i in range(5)}
    job("sample", "docs", "data/sample/docs/record.json", {}, made)
    paths = [Path(path) for path in made.values()]
    job("blend", "all", "data/all.json", {"text": paths[:4], "other": paths[4]}, {"blend": "data/all"})
    lines = [line for line in text("data/all") if "sample" in line]
    assert lines == [
        "├── text: sample docs  data/sample/docs/part_0.jsonl, data/sample/docs/part_1.jsonl, "
        "data/sample/docs/part_2.jsonl and 1 more",
        "└── other: sample docs  data/sample/docs/part_4.jsonl",
    ]


def test_a_branch_that_ends_at_a_damaged_record_says_so(lineage: Path):
    record = Path("data/tokens/docs/a.json")
    record.write_bytes(record.read_bytes()[:100])
    lines = " ".join(text("ckpt/sft"))
    assert "its record is damaged: " in lines and "data/tokens/docs/a.json: not a lineage record (" in lines
    assert "made again since" not in lines


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


@pytest.mark.parametrize("root", [".", "imp"])
def test_a_base_that_was_trained_again_is_named_by_its_version(rebuilt: Path, root: str):
    """With its record, and where that was removed: it is no raw file, and not the one that is there now."""

    def checkpoints() -> list[str]:
        return [line for line in text("imp/ckpt/sft", root) if "checkpoint" in line or "since by" in line]

    assert checkpoints() == [
        "checkpoint sft  imp/ckpt/versions/sft-0f",
        "└── base: checkpoint sft  ckpt/versions/sft-0b",
        "    └── base: checkpoint pretrain/one  ckpt/versions/pretrain_one-0a",
    ]
    prune("pretrain/one-0a")
    assert checkpoints()[2:] == [
        "    └── base: checkpoint pretrain/one-0a  ckpt/pretrain/one",
        "        └── replaced since by pretrain/one-0d, and the record of pretrain/one-0a is gone",
    ]
    catalogue = scan(Path(root))
    diagram = tree.mermaid(catalogue, catalogue.about(Path("imp/ckpt/sft")))
    assert '["checkpoint pretrain/one-0a<br>ckpt/pretrain/one"]' in diagram.replace("#45;", "-")


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


class Facet(BaseModel, extra="forbid"):
    """OpenLineage's facet with the version of a data set, 1-0-1."""

    producer: AnyUrl = Field(alias="_producer")
    schema_url: AnyUrl = Field(alias="_schemaURL")
    dataset_version: str = Field(alias="datasetVersion", min_length=1)


class DataSet(BaseModel, extra="forbid"):
    namespace: str
    name: str
    facets: dict[Literal["version"], Facet]


class Started(BaseModel, extra="forbid"):
    """What OpenLineage's published schema, 2-0-2, demands of a RunEvent, and its names for the rest."""

    type: Literal["START", "COMPLETE"] = Field(alias="eventType")
    time: AwareDatetime = Field(alias="eventTime")  # RFC 3339
    producer: AnyUrl
    schema_url: AnyUrl = Field(alias="schemaURL")
    run: dict[Literal["runId"], UUID]
    job: dict[Literal["namespace", "name"], str]


class Completed(Started):
    inputs: list[DataSet]
    outputs: list[DataSet]


def test_the_events_of_openlineage_are_those_of_its_schema(lineage: Path):
    """The specification demands an event for the start of a run, and one for its end."""
    path = Path("ckpt/sft/record.json")
    record = json.loads(path.read_text(encoding="utf-8")) | {
        "created": "2026-11-02T10:30:00+00:00",
        "seconds": 90.5,
    }
    write_json(path, record)
    catalogue = scan(lineage)
    events = json.loads(json.dumps(formats.openlineage(catalogue, catalogue.about(Path("ckpt/sft")))))
    started, completed = (
        [model.model_validate(event) for event in events[place::2]]
        for place, model in enumerate((Started, Completed))
    )
    assert [one.run for one in started] == [one.run for one in completed]
    assert all(one.run and one.job["namespace"] and one.job["name"] for one in completed)
    assert str(started[-1].time) == "2026-11-02 10:28:29.500000+00:00"
    assert (started[-1].type, completed[-1].type) == ("START", "COMPLETE")


def test_the_events_of_openlineage_name_the_same_data_sets(lineage: Path):
    catalogue = scan(lineage)
    events = formats.openlineage(catalogue, catalogue.about(Path("ckpt/sft")))[1::2]
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

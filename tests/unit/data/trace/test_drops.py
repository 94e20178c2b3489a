"""Why curation removed a document, by its records and the lists of duplicates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from snaketron.data.curation import lists
from snaketron.data.trace import removal
from snaketron.data.trace.fate import fates
from snaketron.lineage.catalogue import scan
from snaketron.lineage.record import of_user
from snaketron.lineage.uses import source
from snaketron.log import UserError
from tests.unit.data.trace.test_text import table

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

RAW = "raw/a.jsonl"


@pytest.fixture
def curated(work: Path, record: Callable[..., Path]) -> Path:
    """Seven rows: 1 is kept, 2 and 3 are filtered out, 4 and 5 duplicates, 6 is contaminated, 7 bad.

    The record quotes row 2 as an example, and not row 3.
    """
    Path(RAW).parent.mkdir()
    Path(RAW).write_text("".join(f'{{"text": "{i}"}}\n' for i in range(1, 8)), encoding="utf-8")
    filtered = Path("data/curation/filtered/docs/a.parquet")
    filtered.parent.mkdir(parents=True)
    rows = [1, 4, 5, 6]
    pq.write_table(pa.table({"text": list("1456"), "file": [RAW] * 4, "row": rows}), filtered)
    example = [{"file": RAW, "row": 2, "text": "2"}]
    counts = {
        "removed": {"gopher": {"documents": 2, "tokens": 2, "examples": example}},
        "dropped": {"bad row": 1},
        "dropped_rows": [{"file": RAW, "row": 7, "reason": "bad row", "detail": ""}],
    }
    made = {"documents": str(filtered)}
    settings = {"text_field": "text"}
    place = "data/curation/filtered/docs/a.json"
    record("filtered", "docs/a", place, {"text": [of_user(Path(RAW))]}, made, settings, counts)
    for name, index in (("exact", 1), ("near", 2)):
        lists.write(Path(f"data/{name}.parquet"), {"docs/a": np.array([index])}, np.uint32, {})
    output = Path("data/curation/curated/docs/a.parquet")
    output.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": ["1"], "file": [RAW], "row": [1]}), output)
    inputs = {"filtered": filtered, "exact": Path("data/exact.parquet"), "near": Path("data/near.parquet")}
    example = [{"file": RAW, "row": 6, "text": "6"}]
    counts = {"removed": {"decontamination": {"documents": 1, "tokens": 1, "examples": example}}}
    place = "data/curation/curated/docs/a.json"
    record("curated", "docs/a", place, inputs, {"documents": str(output)}, {}, counts)
    table("data/tokens/docs/a.parquet", RAW, [("train", 0, 1)])
    Path("data/tokens/docs/a.bin").write_text("1", encoding="utf-8")
    made = {"train.bin": "data/tokens/docs/a.bin", "documents": "data/tokens/docs/a.parquet"}
    record("tokens", "docs/a", "data/tokens/docs/a.json", {"text": [output]}, made, {"corpus": "docs"})
    return work


def test_each_step_of_curation_says_what_it_removed(curated: Path):
    catalogue = scan(curated)
    found = {fate.row: fate.why for fate in fates(catalogue, source(catalogue, RAW), range(1, 8))}
    assert found == {
        1: "",
        2: "filtered out: gopher",
        3: "dropped or filtered out, or not in the file: the record of docs/a lists only the first of its "
        "1 bad row, 2 gopher",
        4: "removed by curation: exact duplicate of an earlier document, which may be trained on",
        5: "removed by curation: near duplicate of an earlier document, which may be trained on",
        6: "removed by curation: decontamination",
        7: "dropped: bad row",
    }


def test_a_filtered_shard_that_is_gone_is_named(curated: Path):
    filtered = Path("data/curation/filtered/docs/a.parquet")
    filtered.unlink()
    catalogue = scan(curated)
    with pytest.raises(
        UserError, match=f"{filtered}: not here any more, so the rows of {RAW} cannot be found"
    ):
        fates(catalogue, source(catalogue, RAW), [4])


def test_a_filtered_shard_may_hold_what_no_later_one_does(curated: Path):
    catalogue = scan(curated)

    def again(row: int) -> list[str]:
        return [made.title for made in removal.removal(catalogue, [(RAW, row)]).again]

    assert again(1) == ["filtered docs/a", "curated docs/a", "tokens docs/a"]
    assert again(4) == ["filtered docs/a", "curated docs/a"]
    assert again(7) == []


def test_a_row_of_a_curated_file_is_the_raw_row_that_it_was(curated: Path):
    """Such a row was looked for among raw ones: none was found, and nothing had to be made again."""
    catalogue = scan(curated)

    def found(file: str, *rows: int) -> list[tuple[str, int, list[str], str]]:
        about = fates(catalogue, source(catalogue, f"data/curation/{file}/docs/a.parquet"), rows)
        return [(fate.file, fate.row, fate.splits, fate.why) for fate in about]

    assert found("curated", 1) == [(RAW, 1, ["train"], "")]
    assert found("filtered", 1, 2) == [
        (RAW, 1, ["train"], ""),
        (RAW, 4, [], "removed by curation: exact duplicate of an earlier document, which may be trained on"),
    ]
    again = removal.removal(catalogue, [("data/curation/curated/docs/a.parquet", 1)]).again
    assert [made.title for made in again] == ["tokens docs/a"]
    with pytest.raises(UserError, match=r"curated/docs/a\.parquet: has 1 row, and no row 2"):
        found("curated", 2)
    Path("data/curation/curated/docs/a.parquet").unlink()
    with pytest.raises(UserError, match=r"a\.parquet: is not here any more, and it alone says which raw"):
        found("curated", 1)

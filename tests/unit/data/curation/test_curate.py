"""The last step: contaminated documents, personal addresses, and what the record says of the whole."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.data.curation import decontamination
from snaketron.log import UserError
from tests.unit.data.curation.curated import Steps, words

import pytest


@pytest.fixture
def steps(tmp_path: Path, tokenizer_dir: Path) -> Steps:
    return Steps(tmp_path, tokenizer_dir)


A, B, C, D = (words(letter) for letter in "abcd")
QUESTION = "How many of the seven swans that swam on the lake at noon had come back by evening?"


def index(steps: Steps, texts: dict[str, list[Any]], n: int = 12) -> dict:
    paths = []
    for name, questions in texts.items():
        paths.append(steps.root / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    return decontamination.decontamination_index(
        paths,
        text_field="question",
        n=n,
        output=steps.root / "index.parquet",
        record=steps.root / "index.json",
    )


# ------------------------------------------------------------------------------------------- contamination


def test_a_document_with_a_question_of_an_evaluation_is_removed(steps: Steps):
    """12 words in a row, whatever the case, the punctuation and the numbers; 11 are not enough."""
    ours = QUESTION.split()
    index(steps, {"other": [words("o")], "swans": [QUESTION]})
    steps.filtered(
        "web/one",
        [
            A,
            f"{B} {QUESTION.upper().replace('?', ' --')} {C}",
            " ".join([B, *ours[:12], C]),
            " ".join([B, *ours[:11], C]),
            D,
        ],
    )
    counts = steps.curate("web/one", n=12)
    assert [row["row"] for row in steps.rows("curated/web/one")] == [1, 4, 5]
    removed = counts["removed"][f"contaminated: {steps.root}/swans.jsonl"]
    assert removed["documents"] == 2
    assert removed["examples"][0]["row"] == 2
    assert removed["examples"][0]["detail"] == "how many of the seven swans that swam on the lake at"


def test_an_evaluation_may_lie_anywhere(steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A path without directories, and one with characters that mean something in a glob."""
    monkeypatch.chdir(tmp_path)
    steps.root = Path()
    index(steps, {"swans": [QUESTION], "[all]": [words("o", 30)]})
    steps.filtered("web/one", [QUESTION, words("o", 30), A])
    removed = steps.curate("web/one", n=12)["removed"]
    assert list(removed) == ["contaminated: swans.jsonl", "contaminated: [all].jsonl"]


def test_the_index_does_not_need_lighteval(steps: Steps):
    """datatrove's step wants it even for documents; the n-grams are 18 words - 12 + 1 and 60 - 12 + 1."""
    with pytest.raises(ImportError, match="lighteval"):
        decontamination.NGramsDecontIndexer("memory://x")
    assert len(QUESTION.split()) == 18
    record = index(steps, {"swans": [QUESTION, "too short"], "other": [words("o")]})
    assert {Path(p).stem: c for p, c in record.counts.items()} == {
        "swans": {"texts": 2, "too_short": 1, "unprotected": 0, "n_grams": 7, "ignored": 0},
        "other": {"texts": 1, "too_short": 0, "unprotected": 0, "n_grams": 49, "ignored": 0},
    }


def test_texts_that_are_too_short_are_said(steps: Steps, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        index(steps, {"swans": [QUESTION, "too short"]})
    assert "swans.jsonl: 1 of 2 texts are shorter than 12 words" in caplog.text
    with pytest.raises(UserError, match="no text of 30 words to protect"):
        index(steps, {"swans": [QUESTION]}, n=30)


def test_a_bad_text_of_an_evaluation_is_corrected_and_never_dropped(steps: Steps):
    """What is dropped would not be looked for; so the error names no policy."""
    with pytest.raises(UserError, match=r"field 'question' is null, not text; correct or remove the row$"):
        index(steps, {"swans": [QUESTION, None]})


def test_numbers_and_few_words_do_not_make_a_document_contaminated(
    steps: Steps, caplog: pytest.LogCaptureFixture
):
    """All numbers are one word to datatrove, so any table would share an n-gram with any other."""
    numbers = " ".join(str(i * i) for i in range(20))  # 9 n-grams, all of them "0 0 ... 0"
    table = "apples pears plums " + numbers
    chorus = "la di da " * 8  # 3 n-grams, of three words
    with caplog.at_level(logging.WARNING):
        record = index(steps, {"swans": [QUESTION, table, chorus, numbers]})
    # N-grams of the table that begin with one of its words, "0 ... 0", and three of the chorus.
    assert record.counts[f"{steps.root}/swans.jsonl"] == {
        "texts": 4,
        "too_short": 0,
        "unprotected": 3,
        "n_grams": 7,
        "ignored": 3 + 1 + 3,
    }
    assert (
        "swans.jsonl: 7 n-grams of numbers and few different words, which many documents share, are ignored; "
        "3 of 4 texts have no others and are not protected" in caplog.text
    )
    prices = "In the year " + ", ".join(str(1900 + i) for i in range(30))
    mixed = f"{B} {QUESTION.replace('seven', '7').replace('noon', '12')}"
    steps.filtered("web/one", [prices, table, "la di da " * 20, QUESTION, mixed])
    with caplog.at_level(logging.WARNING):
        counts = steps.curate("web/one", n=12)
    assert [row["row"] for row in steps.rows("curated/web/one")] == [1, 2, 3, 5]
    assert counts["ignored_matches"]["documents"] == 3  # the prices, the table and the chorus
    assert re.search("web/one: 3 documents with .* tokens share only numbers and few different", caplog.text)
    assert counts["removed"][f"contaminated: {steps.root}/swans.jsonl"]["documents"] == 1


def test_a_question_with_numbers_is_found_with_other_numbers(steps: Steps):
    """Half of the twelve words must be different words, so a problem of arithmetic still counts."""
    problem = "Ann has {} apples and gives {} of them to Bob and {} to Eve. How many are left?"
    index(steps, {"swans": [problem.format(12, 3, 4)]})
    steps.filtered("web/one", [problem.format(20, 5, 7.5), A])
    counts = steps.curate("web/one", n=12)
    assert counts["kept"]["documents"] == 1


def test_an_index_of_other_n_grams_is_noticed(steps: Steps):
    index(steps, {"swans": [QUESTION]}, n=10)
    steps.filtered("web/one", [A])
    with pytest.raises(UserError, match="of 10 words, not 12"):
        steps.curate("web/one", n=12)


# -------------------------------------------------------------------------------------------------- PII


def test_addresses_are_replaced_and_counted(steps: Steps):
    texts = [
        "Write to joe.doe+x@corp.co.uk, or to ann@corp.com.",
        "The server is 8.8.8.8, at home it is 192.168.1.7.",  # a private address says nothing of anyone
        "Nothing here @ all, version 1.2.3.",
        "Again joe.doe@corp.com",
    ]
    steps.filtered("web/one", texts)
    counts = steps.curate("web/one", pii=True)
    assert steps.texts("curated/web/one") == [
        "Write to email@example.com, or to firstname.lastname@example.org.",
        "The server is 22.214.171.124, at home it is 192.168.1.7.",
        texts[2],
        "Again email@example.com",  # begins anew, whatever was replaced before
    ]
    assert counts["changed"]["pii"]["documents"] == 3
    assert counts["tokens"] + counts["changed"]["pii"]["tokens"] == counts["kept"]["tokens"]
    assert counts["removed"] == {}


# ------------------------------------------------------------------------------------------- the whole of it


def test_the_record_counts_from_the_raw_files_to_what_is_left(steps: Steps):
    index(steps, {"swans": [QUESTION]})
    raw = steps.raw("web/one", ["SECRET", A, A, B, f"{C} {QUESTION} x@y.com", "mail a@b.com " + D, ""])
    steps.filter("web/one", [raw], {"name": "regex", "options": {"pattern": "SECRET"}})
    steps.exact(["web/one"])
    counts = steps.curate("web/one", n=12, pii=True)
    assert {reason: entry["documents"] for reason, entry in counts["removed"].items()} == {
        "regex SECRET": 1,
        "empty": 1,
        "exact duplicate": 1,
        f"contaminated: {steps.root}/swans.jsonl": 1,
    }
    assert counts["documents"] == counts["rows"] == 7 and counts["kept"]["documents"] == 3
    assert counts["removed"]["exact duplicate"]["examples"] == [
        {"file": str(raw), "row": 3, "text": A[:200]},
    ]
    tokens = counts["kept"]["tokens"] + sum(entry["tokens"] for entry in counts["removed"].values())
    assert counts["tokens"] + counts["changed"]["pii"]["tokens"] == tokens
    record = files.read_json(steps.root / "curated/web/one.json")
    assert record["kind"] == "curated" and record["name"] == "web/one"
    assert [Path(entry["path"]).name for entry in record["inputs"]] == [
        "one.parquet",
        "exact.parquet",
        "index.parquet",
    ]


def test_lists_of_another_shard_are_noticed(steps: Steps):
    steps.filtered("web/one", [A, B])
    steps.filtered("web/two", [A, B, C, C])
    steps.exact(["web/two"])
    with pytest.raises(UserError, match="nothing about web/one"):
        steps.curate("web/one")
    steps.filtered("web/two", [A, B])  # changed since
    with pytest.raises(UserError, match="document 3 is listed as a duplicate and is not there"):
        steps.curate("web/two")


def test_a_damaged_or_missing_shard_is_an_error(steps: Steps):
    steps.filtered("web/one", [A])
    path = steps.root / "filtered/web/one.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"one\.parquet: damaged or not Parquet"):
        steps.curate("web/one")
    path.unlink()
    with pytest.raises(UserError, match=r"one\.parquet: no such file"):
        steps.curate("web/one")

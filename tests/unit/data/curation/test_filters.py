"""Filters: which documents they remove, what is counted, and what the configuration knows of them."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path

from snaketron.config import FILTERS, Filter
from snaketron.data.curation import filters
from snaketron.lineage.record import read
from snaketron.log import UserError
from tests.unit.data.conftest import slow_imports
from tests.unit.data.curation.curated import Steps, language_model, words

import pytest
from datatrove.pipeline.filters import LanguageFilter

PROSE = (
    "The harbour lies in the shade of the old town, and the boats that have been at sea since dawn come in. "
    "People stand on the quay with baskets and wait for the fish to be sold. "
    "Some of them talk of the storm that took the lighthouse, and of the men who went to look for it. "
    "Nobody has seen them since, but the light is back in the tower every night. "
)


@pytest.fixture
def steps(tmp_path: Path, tokenizer_dir: Path) -> Steps:
    return Steps(tmp_path, tokenizer_dir)


def accounted(counts: dict) -> bool:
    """Whether every row and every token is kept, removed or changed."""
    parts = [counts["kept"], *counts["removed"].values()]
    changed = sum(entry["tokens"] for entry in counts["changed"].values())
    return (
        counts["documents"] == sum(p["documents"] for p in parts)
        and counts["tokens"] + changed == sum(p["tokens"] for p in parts)
        and counts["rows"] == counts["documents"] + sum(counts["dropped"].values())
    )


# --------------------------------------------------------------------------------- what the dry-run knows


@pytest.mark.parametrize("name", FILTERS)
def test_the_options_in_the_configuration_are_those_of_the_class(name: str):
    parameters = set(inspect.signature(filters.CLASSES[name].__init__).parameters)
    assert parameters - {"self", "exclusion_writer"} == set(FILTERS[name])


def test_the_options_of_the_language_filter_are_options_of_datatrove():
    parameters = set(inspect.signature(LanguageFilter.__init__).parameters)
    assert set(FILTERS["language"]) - {"model"} <= parameters


def test_there_is_a_class_for_each_name():
    assert set(filters.CLASSES) == set(FILTERS) == set(Filter.model_fields["name"].annotation.__args__)


# --------------------------------------------------------------------------------- what is removed, and why


def test_filters_run_in_order_and_each_drop_has_a_reason(steps: Steps):
    raw = steps.raw(
        "web/one",
        [
            PROSE,  # stays
            "too short",
            "SECRET " + PROSE,
            "#" * 40 + " " + " # ".join(PROSE.split()),  # hashes
            "",
            "SECRET",  # the pattern is looked for first
        ],
    )
    counts = steps.filter(
        "web/one",
        [raw],
        {"name": "regex", "options": {"pattern": "^SECRET"}},
        {"name": "gopher_quality", "options": {"min_doc_words": 20}},
    )
    assert {reason: entry["documents"] for reason, entry in counts["removed"].items()} == {
        "regex ^SECRET": 2,
        "gopher_quality: gopher_short_doc": 2,  # the empty one, too
        "gopher_quality: gopher_too_many_hashes": 1,
    }
    assert steps.texts("filtered/web/one") == [PROSE]
    assert accounted(counts)
    assert counts["documents"] == counts["rows"] == 6 and counts["kept"]["documents"] == 1


def test_examples_are_the_first_ones_and_short(steps: Steps):
    raw = steps.raw("web/one", [PROSE, *(f"SECRET {i} " + "x" * 300 for i in range(5))])
    entry = {"name": "regex", "options": {"pattern": "SECRET"}}
    removed = steps.filter("web/one", [raw], entry, num_examples=2)["removed"]["regex SECRET"]
    assert removed["documents"] == 5
    assert [(e["file"], e["row"]) for e in removed["examples"]] == [(str(raw), 2), (str(raw), 3)]
    assert all(len(e["text"]) == 200 for e in removed["examples"])


def test_a_filter_that_edits_is_accounted_for(steps: Steps):
    """C4 removes lines: here the one that mentions javascript."""
    line = "A whole sentence stands in each of these lines."
    raw = steps.raw("web/one", ["\n".join([line, "Please enable javascript to see it all.", *[line] * 5])])
    counts = steps.filter("web/one", [raw], {"name": "c4_quality", "options": {}})
    assert steps.texts("filtered/web/one") == ["\n".join([line] * 6)]
    assert counts["changed"]["c4_quality"]["documents"] == 1
    assert counts["changed"]["c4_quality"]["tokens"] < 0
    assert accounted(counts)


def test_what_an_edit_leaves_empty_is_removed(steps: Steps):
    raw = steps.raw("web/one", ["no end mark here", "This one has an end mark."])
    counts = steps.filter("web/one", [raw], {"name": "c4_quality", "options": {"min_num_sentences": -1}})
    assert counts["removed"]["empty"]["documents"] == 1
    assert steps.texts("filtered/web/one") == ["This one has an end mark."]
    assert accounted(counts)


def test_tokens_are_those_of_the_tokenizer_and_an_end_of_each_document(steps: Steps):
    from snaketron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(steps.tokenizer)
    texts = [PROSE, "the quick brown fox", "日本語"]
    counts = steps.filter("web/one", [steps.raw("web/one", texts)])
    assert (
        counts["tokens"] == counts["kept"]["tokens"] == sum(len(tokenizer.encode(t).ids) + 1 for t in texts)
    )


def test_lists_of_the_configuration_are_accepted(steps: Steps):
    """YAML has lists only; datatrove wants a tuple of characters."""
    raw = steps.raw("web/one", [PROSE.replace(". ", ".\n"), PROSE.replace(". ", "\n")])
    entry = {"name": "fineweb_quality", "options": {"stop_chars": ["."], "new_line_ratio": 1.0}}
    counts = steps.filter("web/one", [raw], entry)
    assert counts["removed"]["fineweb_quality: line_punct_ratio"]["documents"] == 1
    repetition = {"name": "gopher_repetition", "options": {"top_n_grams": [[2, 0.2]], "dup_n_grams": []}}
    counts = steps.filter("web/two", [steps.raw("web/two", [PROSE, "again and " * 50])], repetition)
    assert counts["removed"]["gopher_repetition: top_2_gram"]["documents"] == 1


# ------------------------------------------------------------------------------------------------ reading


def test_a_shard_of_several_files_keeps_where_each_document_came_from(steps: Steps, tmp_path: Path):
    first = tmp_path / "a.jsonl"
    rows = [{"body": "one", "id": 7, "tags": ["x"]}, {"body": "two"}]
    first.write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = tmp_path / "b.jsonl"
    second.write_text(json.dumps({"body": "three", "id": "z"}) + "\n")
    steps.filter("web/a", [first, second], text_field="body", metadata_fields=["id", "tags"])
    assert steps.rows("filtered/web/a") == [
        {"text": "one", "file": str(first), "row": 1, "id": "7", "tags": '["x"]'},
        {"text": "two", "file": str(first), "row": 2, "id": None, "tags": None},
        {"text": "three", "file": str(second), "row": 1, "id": "z", "tags": None},
    ]


def test_a_sample_stops_after_so_many_documents(steps: Steps):
    raw = [steps.raw("web/a", ["one", "two"]), steps.raw("web/b", ["three", "four"])]
    counts = steps.filter("web/sample", raw, max_documents=3)
    assert steps.texts("filtered/web/sample") == ["one", "two", "three"]
    assert counts["rows"] == 3 and accounted(counts)
    steps.filter("web/less", raw, max_documents=2)
    record = read(steps.root / "filtered/web/less.json")
    assert [entry.path for entry in record.inputs] == [str(raw[0])]  # the other was not opened


def test_rows_that_cannot_be_read_are_dropped_and_counted_when_asked(steps: Steps):
    raw = steps.raw("web/a", ["one", "two"])
    raw.write_text(raw.read_text() + "not JSON\n" + json.dumps({"text": 5}) + "\n")
    with pytest.raises(UserError, match=":3: invalid JSON"):
        steps.filter("web/a", [raw])
    counts = steps.filter("web/a", [raw], bad_rows="drop", max_dropped_fraction=0.5)
    assert counts["dropped"] == {"bad row": 2} and accounted(counts)
    assert [row["row"] for row in counts["dropped_rows"]] == [3, 4]
    with pytest.raises(UserError, match="2 of 4 rows are bad"):
        steps.filter("web/a", [raw], bad_rows="drop", max_dropped_fraction=0.4)


def test_text_in_which_characters_were_replaced_is_counted_to_the_end(steps: Steps):
    raw = steps.raw("web/a", ["one"])
    raw.write_text(raw.read_text() + '{"text": "lone \\ud800 surrogate"}\n')
    assert steps.filter("web/a", [raw], invalid_text="replace")["replaced"] == 1
    assert [row["text"] for row in steps.rows("filtered/web/a")] == ["one", "lone \ufffd surrogate"]
    steps.exact(["web/a"])
    steps.near(["web/a"])
    assert steps.curate("web/a")["replaced"] == 1


def test_nothing_left_is_an_empty_shard_and_said_aloud(steps: Steps, caplog: pytest.LogCaptureFixture):
    raw = steps.raw("web/a", ["one", "two"])
    with caplog.at_level(logging.WARNING):
        steps.filter("web/a", [raw], {"name": "regex", "options": {"pattern": "."}})
    assert "web/a: NOTHING IS LEFT of 2 rows: 2 x regex ." in caplog.text
    assert steps.rows("filtered/web/a") == []
    assert steps.exact(["web/a"]) == {"web/a": []}
    assert steps.near(["web/a"]) == {"web/a": []}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        counts = steps.curate("web/a")
    assert "web/a: NOTHING IS LEFT of 2 documents" in caplog.text
    assert counts["kept"] == {"documents": 0, "tokens": 0} and accounted(counts)
    assert steps.rows("curated/web/a") == []


def test_a_file_without_documents_is_an_error(steps: Steps):
    """It may be a copy that failed; of files after a limit nothing is known."""
    full, empty = steps.raw("web/a", ["one"]), steps.raw("web/b", [])
    for files in ([empty], [full, empty], [empty, full]):
        with pytest.raises(UserError, match=r"b\.jsonl: holds no documents"):
            steps.filter("web/a", files)
    assert steps.filter("web/a", [full, empty], max_documents=1)["documents"] == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "regex", "options": {"pattern": "("}}, "'\\(' is not a regular expression"),
        (
            {"name": "language", "options": {"model": "no.bin", "languages": ["en"]}},
            "no.bin is not a fastText",
        ),
    ],
)
def test_a_wrong_option_is_named(steps: Steps, entry: dict, message: str):
    with pytest.raises(UserError, match=message):
        steps.filter("web/a", [steps.raw("web/a", ["one"])], entry)


def test_a_metadata_field_cannot_have_the_name_of_a_column(steps: Steps):
    with pytest.raises(UserError, match="metadata_fields: 'row' is a column of curated text"):
        steps.filter("web/a", [steps.raw("web/a", ["one"])], metadata_fields=["row"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of datatrove's division by zero
def test_a_failing_filter_names_the_document(
    steps: Steps, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Without a minimum of words, datatrove's filter divides by the number of words."""
    raw = steps.raw("web/a", [PROSE, " \n "])
    entry = {"name": "gopher_quality", "options": {"min_doc_words": None, "min_avg_word_length": None}}
    with pytest.raises(ZeroDivisionError):
        steps.filter("web/a", [raw], entry)
    assert f"failed at the document {raw}:2" in caplog.text
    assert not (steps.root / "filtered/web/a.parquet").exists()


# ---------------------------------------------------------------------------------------------- language


def test_the_language_filter_reads_a_model_of_this_machine(steps: Steps):
    model = language_model(steps.root / "lid.bin")
    raw = steps.raw("web/a", ["the old house", "das alte haus ist", "the water"])
    entry = {"name": "language", "options": {"model": str(model), "languages": ["en"]}}
    counts = steps.filter("web/a", [raw], entry)
    assert steps.texts("filtered/web/a") == ["the old house", "the water"]
    assert counts["removed"]["language"]["documents"] == 1
    record = read(steps.root / "filtered/web/a.json")
    assert [Path(i.path).name for i in record.inputs] == ["a.jsonl", "lid.bin"]


# ------------------------------------------------------------------------------------------------ words


def test_remembered_words_are_the_same_words(monkeypatch: pytest.MonkeyPatch):
    from snaketron.data.curation import words as remembered

    from datatrove.utils.word_tokenizers import SpaCyTokenizer

    texts = [PROSE, "It's 3.14, isn't it? (e.g. a@b.org)", "x \n\n\ty ", words("x"), "naïve café", "", PROSE]
    expected = [SpaCyTokenizer("en").word_tokenize(text) for text in texts]
    spans = [SpaCyTokenizer("en").span_tokenize(text) for text in texts]
    fresh = SpaCyTokenizer("en")
    monkeypatch.setattr(remembered, "load_word_tokenizer", lambda language: fresh)
    monkeypatch.setattr(remembered, "LEARN_CHARACTERS", len(PROSE) + 10)  # so that it forgets again, too
    remembered.learn("eng")
    assert [fresh.word_tokenize(text) for text in texts] == expected
    assert [fresh.span_tokenize(text) for text in texts] == spans


def test_ascii_text_is_simplified_as_datatrove_does():
    from snaketron.data.curation.words import simplify_text

    from datatrove.utils.text import TextNormConfig
    from datatrove.utils.text import simplify_text as expected

    everything = "".join(chr(code) for code in range(0x11000) if not 0xD800 <= code < 0xE000)
    for text in [
        PROSE,
        "A, b; 1,5 -- {x}\n\ty",
        "Naïve É 日本",
        "",
        "\x00 a",
        " \u0301 x \u2000",
        everything,
    ]:
        assert simplify_text(text, TextNormConfig()) == expected(text)


def test_the_job_does_not_import_what_is_slow(steps: Steps, tmp_path: Path):
    arguments = [
        *("--text", steps.raw("docs/a", [PROSE, "short"]), "--tokenizer", steps.tokenizer),
        *("--settings", json.dumps({"text_field": "text", "metadata_fields": [], "filters": []})),
        *("--output", tmp_path / "docs/a.parquet", "--record", tmp_path / "docs/a.json"),
    ]
    assert slow_imports("filter_shard", *arguments) == {"datatrove"}

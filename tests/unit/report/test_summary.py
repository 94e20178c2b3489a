"""The summary of a run, from records written by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.log import UserError
from snaketron.report.summary import summarize
from tests.records import record
from tests.unit.report.conftest import packs

import pytest


def shard(tokens: int, documents: int, num_bytes: int, empty: int = 0) -> dict[str, Any]:
    counts = {"documents": documents, "bytes": num_bytes, "dropped": {"empty": empty, "no_tokens": 0}}
    splits = (("train", tokens, num_bytes - 40), ("valid", 10, 40), ("test", 0, 0))
    return counts | {s: {"documents": 1, "tokens": t, "bytes": b} for s, t, b in splits}


NO_PACKS = packs(0, 0, 0, 0)


def trained(before: float | None, after: float | None, test: float | None, **counts: float) -> dict[str, Any]:
    return {"valid_loss_before": before, "valid_loss_after": after, "test_loss": test, **counts}


RESULT = trained(2.0, 1.0, None, iterations=1, tokens=1, train_seconds=1.0)


def publish(link: Path, record: dict[str, Any]) -> None:
    """Write the record of a checkpoint into its version, and lead the link there."""
    version = link.parent / f"{record['name'].replace('/', '_')}-{record['key']}"
    files.write_json(version / "record.json", record)
    link.unlink(missing_ok=True)
    link.symlink_to(version)


@pytest.fixture
def run(make, tmp_path: Path):
    """Two shards of one corpus and one source, a blend of each, two phases and SFT."""

    def checkpoint(
        path: str, *inputs: dict[str, Any], counts: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        """Publish a checkpoint; returns how the record of a later one lists it as its input."""
        made = record("checkpoint", path, seconds=seconds, key="0a", counts=counts, inputs=list(inputs))
        publish(tmp_path / path, made)
        return {"name": "base", "path": str(tmp_path / path), "version": f"{path}-0a"}

    docs = {"corpus": "docs"}
    shards = [
        make(
            "docs/a.json", "tokens", settings=docs, counts=shard(1_000, 30, 1_500_000, empty=2), seconds=1.25
        ),
        make("docs/b.json", "tokens", settings=docs, counts=shard(2_345, 1_000, 2_100_000), seconds=2),
    ]
    blend = make("pretrain/record.json", "blend", *shards, counts={})
    source = {"source": "tools", "pack_size": 100}
    rendered = make(
        "chat/a.json",
        "render_chat",
        settings=source,
        counts={"rows": 1_208, "dropped": {"unknown role": 1_200}},
    )
    splits = {
        "train": packs(3, 240, 90, 7, **{"longer than a pack": 2}),
        "valid": packs(1, 60, 10, 1),
        "test": NO_PACKS,
    }
    packed = make("sft/a.json", "pack_sft", rendered, settings=source, counts={"splits": splits})
    broad = checkpoint(
        "ckpt/pretrain/broad",
        blend,
        counts=trained(7.5, 4.25, None, iterations=10, tokens=20_480, train_seconds=4.0),
        seconds=9,
    )
    checkpoint(
        "ckpt/sft",
        packed,
        broad,
        counts=trained(4.0, 3.12345, 3.5, iterations=1_200, tokens=1_000, train_seconds=0.5),
        seconds=12.34,
    )
    return tmp_path / "ckpt/sft"


def sections(text: str) -> dict[str, str]:
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in text.split("## ")[1:]}


def test_training_is_from_the_first_phase_to_the_last(run: Path):
    # 20,480 tokens in 4 s; names are the records', which here are paths
    assert sections(summarize(run))["Training"].splitlines() == [
        "| training            | steps | tokens | valid loss before |  after | test loss | tokens/s |",
        "|---------------------|------:|-------:|------------------:|-------:|----------:|---------:|",
        "| ckpt/pretrain/broad |    10 | 20,480 |            7.5000 | 4.2500 |         - |    5,120 |",
        "| ckpt/sft            | 1,200 |  1,000 |            4.0000 | 3.1235 |    3.5000 |    2,000 |",
    ]


def test_a_base_that_was_trained_again_is_told_of_as_it_was(run: Path):
    """Its version lies beside the one to which its link leads now."""
    before = summarize(run)
    link = run.parent / "pretrain/broad"
    old = link.resolve()
    counts = trained(7.5, 2.5, None, iterations=99, tokens=1, train_seconds=1.0)
    record = files.read_json(old / "record.json")
    publish(link, record | {"key": "0b", "counts": counts})
    assert summarize(run) == before
    shutil.rmtree(old)
    table, _, sentence = sections(summarize(run))["Training"].partition("\n\n")
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["ckpt/sft"]
    assert sentence == (
        f"{link} is not listed: replaced since by ckpt/pretrain/broad-0b, and the record of "
        "ckpt/pretrain/broad-0a is gone."
    )


def test_the_mix_of_the_last_training_is_shown_against_the_weights(run: Path):
    assert "Mix" not in sections(summarize(run))
    record = run / "record.json"
    value = files.read_json(record)
    sums = {"packs": 12, "conversations": 3_456, "tokens": 300, "trained_tokens": 100, "epochs": 1.5}
    value["counts"]["sources"] = {
        "tools": {"weight": 2 / 3, "share": 0.75, **sums, "valid_loss": 3.25},
        "rare": {"weight": 1 / 3, "share": 0.25, **sums, "valid_loss": None},
    }
    files.write_json(record, value)
    assert [line.replace(" ", "") for line in sections(summarize(run))["Mix"].splitlines()] == [
        "|chatsource|wanted|trained|packs|conversations|tokens|trainedtokens|epochs|validloss|",
        "|-------------|-------:|--------:|------:|--------------:|-------:|---------------:|-------:|-----------:|",
        "|tools|66.7%|75.0%|12|3,456|300|100|1.50|3.2500|",
        "|rare|33.3%|25.0%|12|3,456|300|100|1.50|-|",
        "",
        "Conversationsfill600ofthe1,000tokensofthesepacks;therestispadding.",
    ]


def test_the_mix_of_a_pretraining_is_by_corpus(run: Path):
    """One that is held out as a whole has no part in the training, and its validation loss."""
    record = run / "record.json"
    value = files.read_json(record)
    sums = {"samples": 1_200, "trained_tokens": 4_800, "epochs": 0.25}
    value["counts"]["sources"] = {"docs": {"weight": 0.5, "share": 0.75, **sums, "valid_loss": 3.25}}
    value["counts"]["held_out"] = {"mine": 3.5}
    files.write_json(record, value)
    lines = [line.replace(" ", "") for line in sections(summarize(run))["Mix"].splitlines()]
    assert lines[0] == "|corpus|wanted|trained|samples|trainedtokens|epochs|validloss|"
    assert lines[2:] == ["|docs|50.0%|75.0%|1,200|4,800|0.25|3.2500|", "|mine|-|-|-|-|-|3.5000|"]


def test_performance_is_of_the_stages_that_measured_it(run: Path):
    assert "Performance" not in sections(summarize(run))
    path = run / "record.json"
    record = json.loads(path.read_text())
    record["counts"] |= {"tokens_per_second_per_process": 20_400.4, "tflops_per_process": 187.91}
    record["counts"] |= {"peak_memory_gib": 88.04, "step_seconds": 1_200, "data_seconds": 3.25}
    path.write_text(json.dumps(record | {"counts": record["counts"] | {"checkpoint_seconds": 40.06}}))
    lines = sections(summarize(run))["Performance"].splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "of a process", "median tokens/s", "model TFLOP/s", "peak GiB",
        "s in steps", "waiting for data", "in checkpoints",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "ckpt/sft", "20,400", "188", "88.0", "1,200.0", "3.2", "40.1",
    ]  # fmt: skip


def test_text_is_summed_over_the_shards_of_a_corpus(run: Path):
    assert sections(summarize(run))["Text"].splitlines() == [
        "| corpus | shards | rows read |  MB | train tokens | valid | test |",
        "|--------|-------:|----------:|----:|-------------:|------:|-----:|",
        "| docs   |      2 |     1,030 | 3.6 |        3,345 |    20 |    0 |",
        "",
        "Dropped: 2 empty.",
    ]


def test_what_curation_took_out_of_a_corpus_is_no_less_dropped(make, tmp_path: Path):
    """Of 53 rows 3 are bad and 8 duplicates, and of the 42 that are tokenized one is empty."""
    text = tmp_path / "curated/web/a.parquet"
    text.parent.mkdir(parents=True)
    text.write_bytes(b"curated")
    duplicates = {"documents": 8, "tokens": 120}
    counts = {
        "rows": 53,
        "dropped": {"bad row": 3},
        "documents": 50,
        "tokens": 900,
        "kept": {"documents": 42, "tokens": 780},
        "removed": {"exact duplicate": duplicates},
        "changed": {},
    }
    output = {"name": "text", "path": str(text), "sha256": files.sha256(text)}
    make("curated/web/a.json", "curated", counts=counts, name="web/a", outputs=[output])
    tokens = make(
        "web/a.json", "tokens", output, settings={"corpus": "web"}, counts=shard(700, 42, 4_000, empty=1)
    )
    trained_on = record("checkpoint", "base", key="0a", inputs=[tokens], counts=RESULT)
    publish(tmp_path / "ckpt/base", trained_on)
    assert [
        line.replace(" ", "") for line in sections(summarize(tmp_path / "ckpt/base"))["Text"].splitlines()
    ][2:] == [
        "|web|1|53|0.0|700|10|0|",
        "",
        "Dropped:3badrow,1empty,8exactduplicate.",
    ]


def test_conversations_are_summed_over_the_splits(run: Path):
    """300 of 4 packs of 100 tokens; what rendering and packing dropped, in one sentence."""
    assert sections(summarize(run))["Conversations"].splitlines() == [
        "| chat source | conversations | packs | tokens | trained tokens | packing efficiency |",
        "|-------------|--------------:|------:|-------:|---------------:|-------------------:|",
        "| tools       |             8 |     4 |    300 |            100 |              75.0% |",
        "",
        "Dropped: 2 longer than a pack, 1,200 unknown role.",
    ]


def test_time_is_summed_over_the_jobs_of_a_kind(run: Path):
    assert sections(summarize(run))["Time"].splitlines() == [
        "| made                | jobs | seconds |",
        "|---------------------|-----:|--------:|",
        "| blend               |    1 |     1.0 |",
        "| pack_sft            |    1 |     1.0 |",
        "| render_chat         |    1 |     1.0 |",
        "| tokens              |    2 |     3.2 |",
        "| ckpt/pretrain/broad |    1 |     9.0 |",
        "| ckpt/sft            |    1 |    12.3 |",
    ]


def test_answers_are_counted_and_the_first_of_each_kind_is_quoted(run: Path):
    call = "<tool_call>\nf\n</tool_call><|im_end|>"
    asked = [("what?\nnow", " this "), ("call!", call), ("again!", call)]
    (run / "answers").mkdir()
    for step, answers in ((0, ["#", "no", "no"]), (20, ["on the way"] * 3), (100, ["that", call, "no"])):
        entries = [
            {"prompt": prompt, "reference": reference, "answer": answer}
            for (prompt, reference), answer in zip(asked, answers, strict=True)
        ]
        entries[0]["finish_reason"] = "length" if step else "stop"
        files.write_json(run / f"answers/step_{step:07d}.json", entries)
    text = summarize(run)
    assert text.startswith(f"# {run}\n\n## Training\n\n")
    assert sections(text)["Answers"].startswith(
        "| held out | asked | exact by the base | exact after tuning | cut after tuning |\n"
        "|----------|------:|------------------:|-------------------:|-----------------:|\n"
        "| calls    |     2 |                 0 |                  1 |                0 |\n"
        "| texts    |     1 |                 0 |                  0 |                1 |\n\n"
        "prompt:\n\n    call!\n\nreference:\n\n    <tool_call>\n    f\n"
    )
    assert text.endswith(
        "prompt:\n\n    what?\n    now\n\nreference:\n\n    this\n\n"
        "base model:\n\n    #\n\ntuned model: (cut)\n\n    that\n"
    )


def test_without_answers_there_is_no_section(run: Path):
    assert list(sections(summarize(run))) == ["Training", "Text", "Conversations", "Time"]


def test_an_unfinished_checkpoint_has_no_summary(tmp_path: Path):
    with pytest.raises(UserError, match=r"record.json: no such record"):
        summarize(tmp_path)

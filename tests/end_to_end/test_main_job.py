"""The main job from nothing to ckpt/sft: what it leaves behind, and what it says."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from snaketron.files import sha256
from snaketron.graph.journal import Journal
from snaketron.lineage.record import read
from tests.conftest import Workspace
from tests.end_to_end.processes import shell_lines
from tests.end_to_end.test_kill import is_record, weights

import pytest
import yaml


def valid_losses(checkpoint: Path) -> list[float]:
    lines = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    return [line["valid_loss"] for line in lines if "valid_loss" in line]


def test_learning_is_real(finished: Workspace):
    """Half a minute of training takes a nat off the loss of text, and SFT a part of that of chats."""
    ckpt = finished.path / "ckpt"
    broad, focused = valid_losses(ckpt / "pretrain/broad"), valid_losses(ckpt / "pretrain/focused")
    sft = valid_losses(ckpt / "sft")
    print(f"pretraining {broad} then {focused}, SFT {sft}")
    assert broad[0] == pytest.approx(6.93, abs=0.1)  # log(1024): nothing is known at the start
    assert broad[-1] < broad[0] - 0.5 and focused[-1] < focused[0] - 0.05
    assert sft[-1] < sft[0] - 0.3


def test_the_second_phase_starts_where_the_first_ends(finished: Workspace):
    """On documentation alone the loss of the first step is that of the trained model, not 6.93."""
    ckpt = finished.path / "ckpt"
    assert valid_losses(ckpt / "pretrain/focused")[0] < valid_losses(ckpt / "pretrain/broad")[0] - 0.4
    lines = (ckpt / "pretrain/focused/metrics.jsonl").read_text().splitlines()
    rates = [line["learning_rate"] for line in map(json.loads, lines) if "learning_rate" in line]
    # 12288 + 8192 tokens, the last 6144 decay: steps 14 to 20 of 1024 tokens, step 2k at its start.
    expected = [3e-5 + 2.97e-3 * (1 - max(0, (k - 14) / 6) ** 0.5) for k in (13, 15, 17, 19)]
    assert rates == pytest.approx(expected)


def test_a_checkpoint_is_complete(finished: Workspace):
    checkpoint = finished.path / "ckpt/sft"
    assert checkpoint.is_symlink()
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "10"
    assert (checkpoint / "iter_0000010/metadata.json").exists()
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    assert config["settings"]["train_iters"] == 10 and config["run"]["save_interval"] == 4
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"


def test_every_record_tells_the_truth(finished: Workspace, monkeypatch: pytest.MonkeyPatch):
    """Each output has the hash in its record, and each input that of the record that made it."""
    monkeypatch.chdir(finished.path)
    found = [*Path("data").rglob("*.json"), *Path("ckpt/versions").glob("*/record.json")]
    records = [read(p) for p in found if is_record(p)]
    kinds = {record.kind for record in records}
    assert {
        "sample",
        "tokenizer",
        "tokens",
        "blend",
        "index",
        "render_chat",
        "pack_sft",
        "checkpoint",
    } <= kinds
    made = {output.path: output.sha256 for record in records for output in record.outputs}
    for path, digest in made.items():
        assert content_hash(Path(path)) == digest, path
    used = [i for record in records for i in record.inputs if i.path in made]
    assert len(used) > 10
    assert all(made[i.path] == i.sha256 for i in used)


def content_hash(path: Path) -> str:
    """The hash of a file, or of the names and hashes of a directory's files; hidden ones are Snakemake's."""
    if path.is_file():
        return sha256(path)
    files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    return hashlib.sha256("".join(f"{p.name} {sha256(p)}\n" for p in files).encode()).hexdigest()


def test_the_journal_of_a_run_has_its_jobs_and_what_its_trainings_were_to_do(finished: Workspace):
    journal = Journal(finished.path)
    journal.look()
    jobs = list(journal.jobs.values())
    assert Counter(job.rule for job in jobs) == journal.totals
    assert {job.state for job in jobs} == {"finished"} and journal.now > journal.began
    assert ("pretrain broad", "ckpt/pretrain/broad", "logs/pretrain/broad.log") in {
        (job.title, job.output, job.log) for job in jobs
    }
    steps = {name: (one.steps, one.done) for name, one in journal.trainings.items()}
    assert steps == {"pretrain/broad": (12, 0), "pretrain/focused": (8, 0), "sft": (10, 0)}


def test_the_terminal_shows_progress_and_the_summary(finished: Workspace):
    said = (finished.path / "transcript.txt").read_text()
    line = r"pretrain/broad  step \d+/12  loss \d+\.\d{4}  [\d,]+ tokens/s  00:\d\d:\d\d left"
    assert re.search(line, said)
    # A job that starts or ends is a line, and so is the end.
    assert said.count(" starts\n") == 21 and said.count(" is done after ") == 21 and "(21 of 21)" in said
    assert "\nAll jobs are done, after " in said
    assert not re.search("rule sft:|Select jobs|jobid|resources:", said)
    # What takes its time is announced.
    announced = (
        "sft: starts (1 process on 1 node)",
        "sft: validating before the first step",
        "sft: validation loss",
    )
    places = [said.index(text) for text in announced]
    assert places == sorted(places)
    assert "pretrain/broad: saving after step 12" in said  # the last save, however short
    summary = (finished.path / "ckpt/sft/summary.md").read_text()
    assert summary.strip() in said
    parts = ("| pretrain/broad ", "| sft ", "packing efficiency", "base model:", "tuned model:", "Dropped:")
    assert [part for part in parts if part not in summary] == []
    assert "Warning" not in said and "Traceback" not in said


def test_every_printed_command_runs_by_itself(workspace: Workspace, finished: Workspace):
    """The lines of `snakemake -np`, pasted into a shell one after the other, end with the same weights."""
    lines = shell_lines(workspace, "ckpt/sft")
    assert len(lines) == 21
    for line in lines:
        result = workspace.run("bash", "-c", line)
        assert result.status == 0, f"{line}\n{result.output[-2000:]}"
    assert weights(workspace.path / "ckpt/sft") == weights(finished.path / "ckpt/sft")


def test_the_reports_reach_the_report_of_snakemake(copy: Workspace):
    """The page of the run waits for what is asked for beside it, and is made each time."""
    made = copy.snakemake("data_report")
    assert made.status == 0 and made.jobs == {"data_report": 1}, made.output
    page = (copy.path / "data/report/report.html").read_text()
    assert page.count("<svg ") == 5  # one: some chats are longer than a pack
    assert "http" not in page
    text = (copy.path / "data/report/report.md").read_text()
    assert "Encoded by fastokens for 3 shards" in text and "encoded by tokenizers" not in text
    for _ in range(2):
        made = copy.snakemake("ckpt/sft", "report")
        assert made.status == 0 and made.jobs == {"report": 1}, made.output
    page = (copy.path / "report/report.html").read_text()
    assert "http" not in page and len(page) < 1_000_000
    said = (
        "✓ finished",
        "pretrain.seq_length",
        "What is made from what",
        "Curves of sft",
        "answer after step",
    )
    assert [words for words in said if words not in page.replace("<wbr>", "")] == []
    result = copy.snakemake("--report", "report.html", "data_report", "report")
    assert result.status == 0, result.output
    report = (copy.path / "report.html").read_text()
    assert all(f"{name}.svg" in report for name in ("tokens", "lengths", "mix", "removed", "packing"))
    assert "report/report.html" in report


def test_a_prompt_from_standard_input_is_answered(finished: Workspace):
    """Ten steps teach no English; the answer has a few tokens of the vocabulary."""
    line = "echo 'What is a list?' | python scripts/chat.py ckpt/sft --max-tokens 8"
    result = finished.run("bash", "-c", line)
    assert result.status == 0 and result.output.strip(), result.output
    refused = finished.run("bash", "-c", "echo hello | python scripts/chat.py data")
    assert (refused.status, refused.output.count("\n")) == (1, 1)
    assert "data: not a finished checkpoint" in refused.output


def test_an_average_and_its_evaluation_are_made_by_rules_and_go_on_where_they_were_killed(copy: Workspace):
    """The average is that of the two checkpoints that the phase has kept.

    The parts of an evaluation are kept: one that is there already is not computed again.
    """
    config = "eval={text_tokens: 300, chat_packs: 1, answers: 2, answer_tokens: 4}"
    target = "eval/merged/broad.json"
    made = copy.snakemake(target, "--config", config)
    assert made.status == 0 and made.jobs == {"merge_checkpoints": 1, "evaluate": 1}, made.output
    average = read(copy.path / "ckpt/merged/broad/record.json")
    assert list(average.counts["averaged"]) == ["8", "12"]
    found = json.loads((copy.path / target).read_text())
    assert found["stage"] == "merged/broad" and found["checkpoint"] == f"merged/broad-{average.key}"
    assert set(found["text"]) == {"docs", "code"}
    assert all(0 < values["loss"] < 7 for values in found["text"].values())
    assert sum(kind["asked"] for kind in found["answers"]["tools"].values()) == 2
    (part,) = copy.path.glob("eval/versions/merged_broad-*/text_docs.part.json")
    (part.parent / "record.json").unlink()
    part.write_text(json.dumps(found["text"]["docs"] | {"loss": 1.0}))
    (copy.path / target).unlink()
    made = copy.snakemake(target, "--config", config)
    assert made.status == 0 and made.jobs == {"evaluate": 1}, made.output
    again = json.loads((copy.path / target).read_text())
    assert again["text"]["docs"]["loss"] == 1.0
    again["text"]["docs"] = found["text"]["docs"]
    assert again == found

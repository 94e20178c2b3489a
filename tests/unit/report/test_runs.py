"""A run at any time: what is there, what is missing, and why."""

from __future__ import annotations

import html
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

import report as program
from snaketron import files
from snaketron.lineage.record import making, of_user
from snaketron.report.blocks import Facts, Figures, Table, Text, Tree
from snaketron.report.curves import curves_part
from snaketron.report.evaluations import evaluations_part
from snaketron.report.live import Follower
from snaketron.report.measured import measured_part
from snaketron.report.origin import lineage_part
from snaketron.report.overview import missing, summary_part
from snaketron.report.runs import Run, read_run
from tests.unit.report.live_run import BROAD, RunLog

import orjson
import pytest

PLAN = {
    "jobs": {"sft": 1},
    "trainings": [{"name": n, "on_request": n == "lora"} for n in ("pretrain/broad", "sft", "lora")],
}


def read(root: Path, **options) -> Run:
    return read_run(root, {}, PLAN, name="run", alone=options.get("alone", False))


def test_a_finished_run(training, tmp_path: Path):
    training("sft", base="pretrain/broad-0123456789ab")
    training("pretrain/broad")
    run = read(tmp_path)
    assert [(stage.name, stage.state, stage.done) for stage in run.stages] == [
        ("pretrain/broad", "finished", 40),
        ("sft", "finished", 40),
    ]
    assert (run.stages[0].tokens, run.stages[0].processes, run.stages[0].seconds) == (40960, 2, 1800.0)
    assert run.planned == []


def test_the_page_names_the_base_that_was_used_and_says_where_its_record_is_gone(training, tmp_path: Path):
    """ckpt/sft was trained on a base below another root, which was trained again since."""
    old = training("base", root=tmp_path / "other")
    new = old.with_name("base-ba9876543210")
    shutil.copytree(old, new)
    record = files.read_json(old / "record.json")
    files.write_json(new / "record.json", record | {"key": "ba9876543210"})
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/base").symlink_to(new)
    training("sft", base="base-0123456789ab")
    run = read(tmp_path)
    tree = lineage_part(run).blocks[1:]
    assert [(t.line, t.about) for t in tree] == [("checkpoint sft", "ckpt/versions/sft-0123456789ab")]
    assert [(t.line, t.about) for t in tree[0].branches] == [
        ("base: checkpoint base", "other/ckpt/versions/base-0123456789ab")
    ]
    assert run.trouble == []
    shutil.rmtree(old)
    run = read(tmp_path)
    tree = lineage_part(run).blocks[1:]
    (base,) = tree[0].branches
    gone = "replaced since by base-ba9876543210, and the record of base-0123456789ab is gone"
    assert (base.line, base.about) == ("base: checkpoint base-0123456789ab", "ckpt/base")
    assert [b.line for b in base.branches] == [gone]
    assert run.trouble == [f"ckpt/base: {gone}."]


def test_the_page_follows_a_base_of_another_directory_and_counts_no_jobs_of_there(training, tmp_path: Path):
    """The paths in its record are those of that directory."""
    here, other = tmp_path / "here", tmp_path / "other"
    first = training("pretrain/broad", root=other)
    (other / "ckpt/base").symlink_to(first)
    sft = training("sft", root=other, base="pretrain/broad-0123456789ab")
    lies = sft.relative_to(other)
    weights = {"name": "weights", "path": str(lies / "weights"), "sha256": "0", "bytes": 1}
    files.write_json(sft / "record.json", files.read_json(sft / "record.json") | {"outputs": [weights]})
    lora = training("lora", root=here) / "record.json"
    base = {"name": "base", "path": str("../other" / lies), "version": "sft-0123456789ab"}
    files.write_json(lora, files.read_json(lora) | {"inputs": [base]})
    run = read(here)
    assert run.trouble == []
    assert "pretrain" not in run.rules
    (tree,) = lineage_part(run).blocks[1:]
    (used,) = tree.branches
    assert [used.line, used.branches[0].line] == ["base: checkpoint sft", "base: checkpoint pretrain/broad"]


def test_the_page_names_a_raw_file_that_a_job_copied(training, tmp_path: Path, monkeypatch):
    """The template that was installed has the hash of the user's, which is no product of that job."""
    monkeypatch.chdir(tmp_path)
    files.write_text(given := Path("template.jinja"), "{{ messages }}")
    installed = Path("data/tokenizer/chat_template.jinja")
    record = installed.with_name("chat_template.jinja.json")
    with making("chat_template", "installed", outputs={"template": installed}, record=record) as job:
        shutil.copy(given, job.aside["template"])
        job.inputs = {"template": of_user(given)}
    path = training("sft") / "record.json"
    used = {"name": "template", "path": str(installed), "sha256": files.sha256(installed)}
    files.write_json(path, files.read_json(path) | {"inputs": [used]})
    (sft,) = lineage_part(read(tmp_path)).blocks[1:]
    (template,) = sft.branches
    assert (template.line, template.about) == ("template: chat_template installed", str(installed))
    assert [(raw.line, raw.about) for raw in template.branches] == [
        ("template: raw file", f"template.jinja, 14 bytes, sha256 {used['sha256'][:12]}")
    ]


def test_a_checkpoint_counts_once_though_a_link_leads_to_it(training, tmp_path: Path):
    """Its record lies in its version, and the training after it names the link."""
    base = training("pretrain/broad")
    (tmp_path / "ckpt/base").symlink_to(base)
    training("sft", base="pretrain/broad-0123456789ab")
    run = read(tmp_path)
    assert {name: (rule.done, rule.expected) for name, rule in run.rules.items()} == {
        "pretrain": (1, 1),
        "sft": (1, 1),
    }
    assert len(run.records) == 2


@pytest.mark.parametrize(
    ("attempt", "state", "why"),
    [
        (
            {"outcome": "failed", "error": "out of memory"},
            "failed",
            "out of memory (after step 12)",
        ),
        ({"outcome": "failed", "gave_up": "failed twice"}, "failed", "failed twice"),
        ({"outcome": "requeued"}, "waiting", "waits for its next job, after step 12"),
        ({"outcome": "stopped"}, "stopped", "somebody stopped it after step 12"),
        ({"outcome": None}, "stopped", "it ended without a word: killed, or its machine was lost."),
    ],
)
def test_what_did_not_finish_says_why(training, tmp_path: Path, attempt, state: str, why: str):
    training("pretrain/broad", steps=12, **attempt)
    run = read(tmp_path)
    (stage,) = run.stages
    assert (stage.state, stage.reason[: len(why)]) == (state, why)
    assert run.state == {"waiting": "not finished"}.get(state, state)
    assert why in missing(run)[0] and "Not begun: sft" in missing(run)[-1]


@pytest.mark.parametrize(
    ("outcome", "state", "of_run"), [(None, "stopped", "stopped"), ("requeued", "waiting", "not finished")]
)
def test_the_job_of_a_training_that_stopped_has_not_failed(
    training, job, tmp_path: Path, outcome: str | None, state: str, of_run: str
):
    """A run that was killed was called failed: the job of the training has no benchmark."""
    training("pretrain/broad", steps=12, outcome=outcome)
    job("pretrain/broad", said="12 steps so far")
    run = read(tmp_path)
    assert (run.rules["pretrain"].state, run.state) == (state, of_run)
    job("pretrain/focused", said="error: no space left")
    run = read(tmp_path)
    assert (run.rules["pretrain"].state, run.state) == ("failed", "failed")


def test_an_evaluation_of_another_version_says_so(training, tmp_path: Path):
    """SFT was trained again; its evaluation stood beside the new losses."""
    for name, version in (("pretrain/broad", "0123456789ab"), ("sft", "9876543210ba")):
        training(name)
        found = {"stage": name, "checkpoint": f"{name}-{version}", "text": {"docs": {"loss": 2.5}}}
        files.write_json(tmp_path / f"eval/{name}.json", found)
    said, table = evaluations_part([read(tmp_path)]).blocks
    assert said == Text(
        "eval/sft.json is of another sft (version 9876543210ba) than is shown here (0123456789ab).",
        attention=True,
    )
    assert isinstance(table, Table) and table.rows == [["docs", "loss", "2.5000", "2.5000"]]


def test_the_lineage_has_adapters_that_were_merged_into_their_base(training, tmp_path: Path):
    """No training made that checkpoint, and it is the one that is used."""
    merged = training("lora_merged", base="lora-0123456789ab")
    (tmp_path / "ckpt/lora_merged").symlink_to(merged)
    training("lora", base="pretrain/broad-0123456789ab")
    training("pretrain/broad")
    run = read(tmp_path)
    assert [stage.name for stage in run.stages] == ["pretrain/broad", "lora"]
    trees = [block for block in lineage_part(run).blocks if isinstance(block, Tree)]
    assert [tree.line for tree in trees] == ["checkpoint lora_merged"]
    (merged / "record.json").write_text("{")
    assert any("records of the data cannot be followed" in line for line in missing(read(tmp_path)))


def test_the_loss_before_the_first_step_is_not_that_of_the_training(training, tmp_path: Path):
    """A training that failed at once was shown with the loss of its base."""
    directory = training("sft", outcome="failed", error="not finite")

    def facts(*lines: dict[str, float]) -> dict[str, str]:
        (directory / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        found = summary_part([read_run(tmp_path, {}, None, name="run", alone=False)]).blocks[0]
        assert isinstance(found, Facts)
        return dict(found.facts)

    lines = [{"iteration": 0, "valid_loss": 6.25}, {"iteration": 2, "loss": 6.0}]
    assert "Trained" in facts(*lines) and "Validation loss" not in facts(*lines)
    assert facts(*lines, {"iteration": 2, "valid_loss": 5.75})["Validation loss"] == "5.7500 (sft)"


def test_a_training_on_another_base_than_is_shown_says_so(training, tmp_path: Path):
    """The phase is trained again with more tokens; SFT is still that of before."""
    training("sft", base="pretrain/broad-9876543210ba")
    training("pretrain/broad", steps=12, outcome=None)
    said = "sft stands on another pretrain/broad (version 9876543210ba) than is shown here (0123456789ab)."
    assert said in missing(read(tmp_path))
    training("lora", base="pretrain/broad-0123456789ab")
    assert [line for line in missing(read(tmp_path)) if "stands on" in line] == [said]


def test_adapters_that_were_merged_are_those_of_the_page_or_it_says_so(training, tmp_path: Path):
    """LoRA was trained again and not merged again; its evaluation stood beside that of the old merging."""
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/lora_merged").symlink_to(training("lora_merged", base="lora-9876543210ba"))
    training("lora")
    other = "(version 9876543210ba) than is shown here (0123456789ab)."
    assert missing(read(tmp_path))[0] == f"lora_merged stands on another lora {other}"

    def evaluated(key: str) -> list[str]:
        found = {"stage": "lora_merged", "checkpoint": f"lora_merged-{key}"}
        files.write_json(tmp_path / "eval/lora_merged.json", found)
        blocks = evaluations_part([read(tmp_path)]).blocks
        return [block.text for block in blocks if isinstance(block, Text)]

    assert evaluated("0123456789ab") == []
    assert evaluated("9876543210ba") == [f"eval/lora_merged.json is of another lora_merged {other}"]


def test_a_training_whose_lock_is_held_is_running(training, tmp_path: Path):
    directory = training("pretrain/broad", steps=12, outcome=None, iteration=0)
    with (directory / "lock").open("a") as file:
        assert files.lock(file)
        assert (read(tmp_path).state, read(tmp_path).stages[0].state) == ("running", "running")
        assert ends(tmp_path) == [
            ["running", "12"]
        ]  # it has said nothing yet, as one that was killed has not
    assert ends(tmp_path) == [["no word", "12"]]


def ends(root: Path) -> list[list[str]]:
    """How the attempts that are listed ended, and after which step, by the page."""
    *_, table = measured_part([read_run(root, {}, None, name="run", alone=False)]).blocks
    assert isinstance(table, Table) and table.header[3:7:3] == ["outcome", "to step"]
    return [row[3:7:3] for row in table.rows]


def test_the_time_of_a_training_is_at_least_that_of_its_steps(training, tmp_path: Path):
    """An attempt that was killed has no time; that of the next one alone was taken for all of it."""
    directory = training("pretrain/broad", seconds=100.0)
    lines = [{"iteration": step, "timing": {"seconds": 20.0 * step}} for step in range(41)]
    (directory / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    assert read(tmp_path).stages[0].seconds == 800.0


def test_what_was_asked_for_beside_the_main_job_waits_on_the_page(job, tmp_path: Path):
    """Merging adapters was not drawn before it began: only what ckpt/sft takes was."""
    job("sft", seconds=2.5)
    (tmp_path / ".snakemake").mkdir()
    with (tmp_path / ".snakemake/snaketron.lock").open("a") as file:
        assert files.lock(file)
        RunLog(tmp_path, {"lora": 1, "merge_lora": 1})
        rules = read(tmp_path).rules
    found = {name: (rule.state, rule.done, rule.expected) for name, rule in rules.items()}
    assert found == {
        "sft": ("finished", 1, 1),
        "lora": ("waiting", 0, 1),
        "merge_lora": ("waiting", 0, 1),
    }


def test_the_time_of_a_training_is_that_of_all_its_jobs(training, job, tmp_path: Path):
    """A training that went on in a second job was shown with the time of that: 16 s of 51."""
    training("pretrain/broad", seconds=35.0)
    training("pretrain/focused", seconds=16.0)
    job("pretrain/broad", seconds=4.0)
    job("pretrain/focused", seconds=16.5)
    job("tokenize_shard/docs/a", seconds=2.5)
    rules = read(tmp_path).rules
    assert (rules["pretrain"].seconds, rules["tokenize_shard"].seconds) == ([35.0, 16.0], [2.5])


def test_the_lock_of_the_directory_counts_unless_the_workflow_makes_the_page(job, tmp_path: Path):
    job("sft", said="12 steps so far")
    (tmp_path / ".snakemake").mkdir()
    with (tmp_path / ".snakemake/snaketron.lock").open("a") as file:
        assert files.lock(file)
        assert read(tmp_path).state == "running"
        assert read(tmp_path, alone=True).state == "failed"
        # Another run submits the job again. Until Slurm starts it, its log is that of the run before.
        RunLog(tmp_path, {"sft": 1}).begins(1, "sft", log="logs/sft.log")
        assert read(tmp_path).rules["sft"].state == "running"  # its log is as young as the job
        os.utime(tmp_path / "logs/sft.log", (1e9, 1e9))
        assert read(tmp_path).rules["sft"].state == "waiting"


def test_the_page_and_the_live_view_say_the_same_of_jobs_that_did_not_finish(training, job, tmp_path: Path):
    """SIGKILL ended all processes of a run: one job had failed, another one and a training were running."""
    run = RunLog(tmp_path, {"render_chat": 1, "tokenize_shard": 1, "pretrain": 1}, BROAD)
    run.begins(1, "render_chat", log="logs/render_chat/tools/a.log", source="tools", shard="a")
    run.fails(1, status=1)
    run.begins(2, "tokenize_shard", log="logs/tokenize_shard/docs/a.log", corpus="docs", shard="a")
    output, log = "ckpt/pretrain/broad", "logs/pretrain/broad.log"
    run.begins(3, "pretrain", output, log=log, phase="broad")
    job("render_chat/tools/a", said="a row is too long")
    job("tokenize_shard/docs/a", said="12 rows so far")
    job("pretrain/broad", said="12 steps so far")
    training("pretrain/broad", steps=12, outcome=None)

    def of_view() -> dict[str, str]:
        view = Follower(tmp_path).look()
        return {one.name.partition("/")[0]: one.state for one in (*view.rules, *view.trainings)}

    def of_page() -> dict[str, str]:
        return {name: rule.state for name, rule in read(tmp_path).rules.items() if name != "sft"}

    killed = {"render_chat": "failed", "tokenize_shard": "stopped", "pretrain": "stopped"}
    assert of_view() == of_page() == killed
    assert [line for line in missing(read(tmp_path)) if not line.startswith("Not begun")] == [
        "pretrain/broad has stopped: it ended without a word: killed, or its machine was lost. "
        "It begins anew.",
        "tokenize_shard has stopped, 0 of 1 jobs are done: 12 rows so far (logs/tokenize_shard/docs/a.log).",
        "render_chat failed, 0 of 1 jobs are done: a row is too long (logs/render_chat/tools/a.log).",
    ]
    RunLog(tmp_path, {"report": 1})  # it makes the page, and knows what the run before knew
    assert of_page() == killed
    again = RunLog(tmp_path, {"pretrain": 1}, BROAD)
    again.begins(1, "pretrain", output, log=log, phase="broad")
    again.fails(1, status=137)  # the supervisor alone, by SIGKILL
    assert of_view() == {"pretrain": "failed"} and of_page() == killed | {"pretrain": "failed"}
    assert read(tmp_path).stages[0].state == "failed"


def test_a_rule_of_which_jobs_are_still_to_be_done_says_how_many(job, tmp_path: Path):
    job("tokenize_shard/docs/a", seconds=2.5)
    run = read_run(tmp_path, {}, PLAN | {"jobs": {"tokenize_shard": 3}}, name="run", alone=False)
    assert missing(run)[0] == "tokenize_shard is not complete, 1 of 3 jobs are done."


def test_what_the_configuration_has_no_more_does_not_decide_how_the_run_is(training, job, tmp_path: Path):
    """A phase that had failed was called otherwise, and a bad file was taken out."""
    training("pretrain/wide", steps=12, outcome="failed", error="out of memory")
    training("pretrain/broad")
    training("sft")
    job("tokenize_shard/docs/a", seconds=2.5)
    job("tokenize_shard/docs/bad", said="error: not JSON")
    gone = ("pretrain/wide.log", "tokenize_shard/docs/bad.log")
    run = read_run(tmp_path, {}, PLAN, name="run", alone=False, asked=lambda log: log not in gone)
    assert run.state == "finished"
    assert missing(run) == [
        "pretrain/wide, for which the configuration does not ask any more, failed: out of memory "
        "(after step 12).",
        "tokenize_shard/docs/bad, for which the configuration does not ask any more, failed: error: not JSON "
        "(logs/tokenize_shard/docs/bad.log).",
    ]
    assert read(tmp_path).state == "failed"


def test_a_version_that_was_published_again_is_the_one_of_the_page(training, tmp_path: Path):
    """Another setting of SFT failed, and the settings of before were asked for again and not trained."""
    old = training("sft")
    new = old.with_name("sft-ba9876543210")
    shutil.copytree(old, new)
    (new / "record.json").unlink()
    (attempt,) = files.read_json(new / "attempts.json")
    later = {"started": "2026-11-03T10:00:00+00:00", "outcome": "failed", "error": "out of memory"}
    files.write_json(new / "attempts.json", [attempt | later])
    link = tmp_path / "ckpt/sft"
    link.symlink_to(old)
    for when, state in (("2026-11-02T11:00:00+00:00", "failed"), ("2026-11-03T11:00:00+00:00", "finished")):
        seconds = datetime.fromisoformat(when).timestamp()
        os.utime(link, (seconds, seconds), follow_symlinks=False)
        assert [stage.state for stage in read(tmp_path).stages] == [state]


def test_the_loss_above_all_is_that_of_each_tuning(training, tmp_path: Path):
    training("pretrain/broad")

    def said() -> str:
        run = read_run(tmp_path, {}, None, name="run", alone=False)
        (found,) = (block for block in summary_part([run]).blocks if isinstance(block, Facts))
        return dict(found.facts)["Validation loss"]

    assert said().endswith(" (pretrain/broad)")
    training("lora")
    training("sft")
    assert re.fullmatch(r"[\d.]+ \(sft\), [\d.]+ \(lora\)", said())


def test_losses_by_corpus_are_before_after_and_tested(training, tmp_path: Path):
    """Code has 300 of the 400 trained tokens, in 2 of 4 samples; `mine` is held out as a whole."""
    directory = training("pretrain/broad", steps=0)
    trained = (("docs", 50), ("code", 150))
    corpora = {name: {"loss": 5.0, "samples": 1, "trained_tokens": n} for name, n in trained}
    lines = [{"iteration": i, "valid_sources": {"docs": 7.0 - i, "code": 6.0 - i}} for i in (0, 1, 2)]
    for line in lines:
        line["valid_sources"] |= {"mine": 8.0 - line["iteration"]}
    lines += [{"iteration": i, "loss": 5.0, "sources": corpora} for i in (1, 2)]
    lines.append({"iteration": 2, "test_sources": {"docs": 5.5, "code": 4.25}})
    (directory / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    blocks = curves_part([read(tmp_path)]).parts[0].blocks
    (table,) = (block for block in blocks if isinstance(block, Table))
    assert [table.caption, *table.rows] == [
        "Loss by corpus",
        ["docs", "7.0000", "5.0000", "5.5000", "2", "50.0%", "100", "25.0%"],
        ["code", "6.0000", "4.0000", "4.2500", "2", "50.0%", "300", "75.0%"],
        ["mine", "8.0000", "6.0000", "-", "-", "-", "-", "-"],
    ]
    (drawn,) = (block for block in blocks if isinstance(block, Figures))
    titles = ["Loss (nats a token)", "Loss by corpus, training", "Loss by corpus, validation"]
    assert [figure.title for figure in drawn.figures] == titles


def test_evaluations_are_in_the_order_of_the_trainings(training, tmp_path: Path):
    for stage in ("pretrain/broad", "sft", "lora"):
        training(stage)
    for name in ("lora", "merged/broad", "pretrain/broad", "sft"):
        files.write_json(tmp_path / f"eval/{name}.json", {"stage": name})
    assert [*read(tmp_path).evaluations] == ["pretrain/broad", "sft", "lora", "merged/broad"]


def test_a_metric_that_is_being_written_is_left_out(training, tmp_path: Path):
    directory = training("pretrain/broad", steps=12, outcome=None)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 13, "lo')
    assert read(tmp_path).stages[0].done == 12


@pytest.mark.parametrize("line", [b'{"iteration": 4, "loss": NaN}', b'{"iteration": 4, "timing": "soon"}'])
def test_a_line_that_is_none_of_metrics_hides_no_training(training, tmp_path: Path, line: bytes):
    """Other tools write NaN, which JSON does not have, or other types. The training has 42 lines."""
    directory = training("sft")
    lines = (directory / "metrics.jsonl").read_bytes().split(b"\n")
    lines[4] = line
    (directory / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run = read(tmp_path)
    assert [(stage.name, stage.state, stage.done) for stage in run.stages] == [("sft", "finished", 40)]
    (said,) = (said for said in missing(run) if "metrics" in said)
    assert "1 of 42 lines cannot be read and are left out, the first of them line 5" in said


def test_a_long_training_says_what_its_drawings_leave_out(training, tmp_path: Path):
    """Each of the 10,000 steps has 1,000 tokens a second and its number."""
    training("sft", steps=10_000)
    (part,) = curves_part([read(tmp_path)]).parts
    (said,) = (block.text for block in part.blocks if isinstance(block, Text))
    assert said.startswith("There are 10,002 lines of metrics. A curve has up to 300 points")
    assert said.endswith("Sums are of all lines, and medians of every 128th.")
    stage = read(tmp_path).stages[0]
    assert (stage.done, stage.tokens, stage.total("timing", "step_seconds")) == (10_000, 10_240_000, 100_000)


def test_an_empty_directory_is_a_run_that_was_not_begun(tmp_path: Path):
    assert (read(tmp_path).state, read(tmp_path).planned) == ("not finished", ["pretrain/broad", "sft"])


def test_no_secret_of_the_environment_is_on_the_page(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A job has said one. HTML writes its signs in another way, and it was shown."""
    secret = "a<b&c'd\"e-0123"
    monkeypatch.setenv("HUB_TOKEN", secret)
    job("sft", said=f"error: nobody knows {secret}")
    page = tmp_path / "page.html"
    assert program.main([str(tmp_path), "--output", str(page)]) == 0
    said = html.unescape(page.read_text())
    assert "error: nobody knows [secret]" in said and secret not in said

"""What a live view holds, from the files of a directory alone."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from snaketron import files
from snaketron.graph.journal import JOURNAL, Journal
from snaketron.jobs import slurm
from snaketron.jobs.queue import Queued
from snaketron.report.live import Follower
from tests.unit.report.live_run import BROAD, SFT, RunLog, train

import pytest

TOTALS = {"tokenize_shard": 4, "blend_pretrain": 1, "pretrain": 1, "sft": 1}


@pytest.fixture
def run(tmp_path: Path) -> RunLog:
    """Two shards are tokenized, a third one is on its way, and `broad` has trained 120 of 196 steps."""
    log = RunLog(tmp_path, TOTALS, BROAD | SFT)
    for number in (1, 2, 3):
        log.begins(number, "tokenize_shard", corpus="docs", shard=f"part_{number}")
    for number in (1, 2):
        log.finishes(number)
    log.begins(7, "pretrain", "ckpt/pretrain/broad", phase="broad")
    train(tmp_path, "pretrain/broad", 120, 196)
    return log


def test_a_run_on_its_way(run: RunLog, tmp_path: Path):
    view = Follower(tmp_path, alive=True).look()
    assert (view.state, view.done, view.total) == ("running", 2, 7)
    assert [(rule.name, rule.state, rule.done, rule.total) for rule in view.rules] == [
        ("tokenize_shard", "running", 2, 4),
        ("blend_pretrain", "waiting", 0, 1),
    ]
    assert [job.title for job in view.running] == ["tokenize_shard docs part_3", "pretrain broad"]
    broad, sft = view.trainings
    assert (broad.state, broad.done, broad.total, broad.loss) == ("running", 120, 196, 4.5)
    assert (broad.curve[0], broad.curve[-1], broad.tokens_per_second) == (7.9, 6.8, 500.0)
    assert broad.seconds_left == pytest.approx(2.0 * 76)
    assert (sft.state, sft.done, sft.total, sft.seconds_left) == ("waiting", 0, 90, 1800.0)
    assert view.warning and (view.warning[0], view.warning[1].iteration) == ("pretrain/broad", 20)


def test_stages_are_in_the_order_of_the_workflow(tmp_path: Path):
    """Snakemake counts jobs in no order: curation stood below the tokens that are made of its documents."""
    counted = ("report", "sft", "tokenize_shard", "blend_pretrain", "curate_shard", "filter_shard")
    RunLog(tmp_path, dict.fromkeys(counted, 1), SFT)
    stages = [rule.name for rule in Follower(tmp_path, alive=True).look().rules]
    assert stages == ["filter_shard", "curate_shard", "tokenize_shard", "blend_pretrain", "report"]


@pytest.mark.parametrize(
    "line",
    [
        '{"iteration": 121, "loss": NaN}',
        '{"iteration": 121, "loss": "low"}',
        '{"iteration": 121, "timing": 1}',
    ],
)
def test_a_line_that_is_none_of_metrics_is_passed_over(line: str, run: RunLog, tmp_path: Path):
    before = Follower(tmp_path, alive=True).look().trainings[0]
    (metrics,) = tmp_path.glob("ckpt/versions/pretrain_broad-*/metrics.jsonl")
    with metrics.open("a") as file:
        file.write(f"{line}\n")
    assert Follower(tmp_path, alive=True).look().trainings[0].curve == before.curve


@pytest.mark.parametrize("step", [80, 0])
def test_a_training_that_was_killed_has_done_no_more_than_it_goes_on_from(run: RunLog, tmp_path: Path, step):
    """It was killed after step 120. Its metrics are replaced by the lines up to its last checkpoint."""
    follower = Follower(tmp_path, alive=True)
    assert follower.look().trainings[0].done == 120
    shutil.rmtree(tmp_path / "ckpt/versions")
    train(tmp_path, "pretrain/broad", step, 196)
    assert follower.look().trainings[0].done == step


def test_the_time_left_is_what_was_measured_and_else_what_was_planned(run: RunLog, tmp_path: Path):
    """76 steps at 2 s as measured, and 90 steps of SFT at the planned speed; a shard took no time here."""
    follower = Follower(tmp_path, alive=True)
    view = follower.look()
    assert view.seconds_left == pytest.approx(152 + 1800, abs=1)
    assert view.at_least  # nobody knows how long the blend takes
    files.write_text(tmp_path / "benchmarks/blend_pretrain/broad.tsv", "s\tmax_rss\n30.0\t120\n")
    view = Follower(tmp_path, alive=True).look()
    assert (view.seconds_left, view.at_least) == (pytest.approx(152 + 1800 + 30, abs=1), False)


def test_a_second_look_reads_what_is_new(run: RunLog, tmp_path: Path):
    follower = Follower(tmp_path, alive=True)
    assert follower.look().done == 2
    run.finishes(3)
    metrics = tmp_path / "ckpt/versions/pretrain_broad-0123456789ab/metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"iteration": 130, "loss": 1.5}\n{"iteration": 140, "lo')
    view = follower.look()
    assert (view.done, view.trainings[0].done, view.trainings[0].curve[-1]) == (3, 130, 1.5)
    files.write_text(metrics, '{"iteration": 10, "loss": 7.5}\n')  # continued from before
    assert follower.look().trainings[0].curve == [7.5]


def test_a_version_of_an_earlier_run_is_not_that_of_this_one(tmp_path: Path):
    """The training of another key was finished; that of this run has not begun."""
    import os

    old = train(tmp_path, "pretrain/broad", 196, 196)
    os.utime(old / "attempts.json", (1, 1))
    log = RunLog(tmp_path, TOTALS, BROAD)
    log.begins(7, "pretrain", "ckpt/pretrain/broad", phase="broad")
    (broad,) = Follower(tmp_path, alive=True).look().trainings
    assert (broad.state, broad.done, broad.about) == ("running", 0, "is being started")


def test_a_run_whose_snakemake_is_gone_has_stopped(run: RunLog, tmp_path: Path):
    view = Follower(tmp_path).look()
    assert (view.state, [one.state for one in view.trainings]) == ("stopped", ["stopped", "waiting"])
    assert (view.running, view.seconds_left) == ([], None)
    with (tmp_path / ".snakemake/snaketron.lock").open("w") as file:
        assert files.lock(file)
        assert Follower(tmp_path).look().state == "running"


def test_a_run_that_begins_while_one_looks_is_seen_running_at_once(run: RunLog, tmp_path: Path):
    """It had just been seen that nothing ran in the directory."""
    follower = Follower(tmp_path)
    assert follower.look().state == "stopped"
    with (tmp_path / ".snakemake/snaketron.lock").open("w") as file:
        assert files.lock(file)
        RunLog(tmp_path, {"tokenize_shard": 1})
        view = follower.look()
    assert (view.state, view.done, view.total) == ("running", 0, 1)


def test_a_training_that_outlived_its_snakemake_is_running(run: RunLog, tmp_path: Path):
    with (tmp_path / "ckpt/versions/pretrain_broad-0123456789ab/lock").open("w") as file:
        assert files.lock(file)
        assert Follower(tmp_path).look().trainings[0].state == "running"


@pytest.mark.parametrize(
    ("outcome", "state"), [("failed", "failed"), ("requeued", "waiting"), ("stopped", "stopped")]
)
def test_a_training_that_outlived_its_snakemake_says_how_it_ended(
    run: RunLog, tmp_path: Path, outcome: str, state: str
):
    attempts = tmp_path / "ckpt/versions/pretrain_broad-0123456789ab/attempts.json"
    files.write_json(attempts, [{"outcome": outcome, "iteration": 120}])
    assert Follower(tmp_path).look().trainings[0].state == state


def test_a_failed_job_is_shown_until_it_is_tried_again(run: RunLog, tmp_path: Path):
    run.fails(3)
    view = Follower(tmp_path).look()
    assert (view.state, view.done, view.rules[0].state) == ("failed", 2, "failed")
    assert view.failed == ["tokenize_shard docs part_3"]
    run.begins(3, "tokenize_shard", corpus="docs", shard="part_3")  # tried again
    run.finishes(3)
    assert Follower(tmp_path, alive=True).look().rules[0].state == "running"


def test_all_jobs_of_a_failed_group_have_failed(run: RunLog, tmp_path: Path):
    run.begins(4, "tokenize_shard", corpus="docs", shard="part_4")
    run.fails(3, 4)
    assert Follower(tmp_path).look().failed == ["tokenize_shard docs part_3", "tokenize_shard docs part_4"]


@pytest.mark.parametrize(
    "line", ['{"at": 1, "beg', "5", "[1]", '{"begins": "4"}', '{"at": 1, "begins": "4", "job": {}}']
)
def test_a_line_that_is_none_of_a_journal_is_passed_over(run: RunLog, tmp_path: Path, line: str):
    """A full disk has cut it off, or another version wrote it."""
    before = Follower(tmp_path, alive=True).look().rules
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(f"{line}\n")
    run.finishes(3)
    (tokens, *others) = Follower(tmp_path, alive=True).look().rules
    assert (tokens.done, others) == (3, before[1:])


@pytest.mark.parametrize("sign", ["progress.json", "c.log"])
def test_a_run_that_was_killed_lasted_until_its_last_sign_of_life(run: RunLog, tmp_path: Path, sign: str):
    journal = Journal(tmp_path)
    journal.look()
    (tmp_path / "c.log").write_text("$ python train.py\n")
    for path in tmp_path.rglob("*"):
        later = 32 if path.name.endswith(sign) else 0
        os.utime(path, (journal.began + later,) * 2)
    view = Follower(tmp_path, alive=False).look()
    assert (view.state, view.seconds) == ("stopped", pytest.approx(32))


def test_a_job_that_the_user_has_stopped_did_not_fail(run: RunLog, tmp_path: Path):
    run.add("Terminating processes on user request, this might take some time.")
    run.fails(3)
    view = Follower(tmp_path).look()
    assert (view.state, view.rules[0].state) == ("stopped", "stopped")


@pytest.mark.parametrize(("status", "state"), [(143, "stopped"), (1, "failed")])
def test_a_job_that_ended_by_sigterm_has_stopped(run: RunLog, tmp_path: Path, status: int, state: str):
    """So `timeout` or `kill` stops a whole run; as the lines of the run say, too."""
    run.add("Will exit after finishing currently running jobs (scheduler).")
    run.fails(7, status=status)
    view = Follower(tmp_path).look()
    assert (view.state, view.trainings[0].state) == (state, state)


def test_a_finished_training_is_that_of_its_link(run: RunLog, tmp_path: Path):
    run.finishes(7)
    (tmp_path / "ckpt/pretrain").mkdir()
    (tmp_path / "ckpt/pretrain/broad").symlink_to("../versions/pretrain_broad-0123456789ab")
    broad = Follower(tmp_path, alive=True).look().trainings[0]
    assert (broad.state, broad.seconds_left, len(broad.curve)) == ("finished", 0.0, 12)


def test_a_new_run_is_followed_when_it_comes(run: RunLog, tmp_path: Path):
    follower = Follower(tmp_path, alive=True)
    assert follower.look().total == 7
    RunLog(tmp_path, {"sft": 1})
    assert follower.look().total == 1


def test_an_evaluation_says_how_many_of_its_parts_are_done(tmp_path: Path):
    log = RunLog(tmp_path, {"evaluate": 2})
    for number, stage in enumerate(("pretrain/broad", "sft")):
        log.begins(number, "evaluate", f"eval/{stage}.json", stage=stage)
    version = tmp_path / "eval/versions/pretrain_broad-0123456789ab"
    files.write_json(version / "attempts.json", [{"outcome": None}])
    files.write_json(version / "progress.json", {"iteration": 3, "train_iters": 6})
    running = Follower(tmp_path, alive=True).look().running
    assert [(job.title, job.where) for job in running] == [
        ("evaluate pretrain/broad", "3 of 6 parts are done"),
        ("evaluate sft", ""),
    ]


def test_a_directory_without_a_run(tmp_path: Path):
    assert Follower(tmp_path).look().state == ""


def test_what_waits_in_the_queue_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two shards in a group wait, and a training runs."""
    log = RunLog(tmp_path, {"tokenize_shard": 2, "sft": 1}, SFT)
    log.group(**{"5d1e-31": 1, "0b7c-12": 2})
    for number in (1, 2):
        log.begins(number, "tokenize_shard", corpus="docs", shard=f"part_{number}")
    log.add("Job 0b7c-12 has been submitted with SLURM jobid 42 (log: logs/slurm/42.log).")
    log.begins(3, "sft", "ckpt/sft")
    log.add("Job 3 has been submitted with SLURM jobid 43 (log: logs/slurm/43.log).")
    follower = Follower(tmp_path, alive=True)
    monkeypatch.setattr(follower.queue, "look", lambda: None)
    assert [job.where for job in follower.look().running] == ["job 42", "job 42", "job 43"]
    follower.queue.jobs = [
        Queued("42", "PENDING", "0:00", "1", "Priority", "run", "/x", "rule_tokens_tokenize_shard"),
        Queued("43", "RUNNING", "3:12", "4", "None", "run", "/x", "rule_sft"),
    ]
    view = follower.look()
    assert view.waiting == [("tokens_tokenize_shard  job 42  PENDING (Priority)", 1)]
    assert [(rule.name, rule.state) for rule in view.rules] == [("tokenize_shard", "waiting")]
    assert [job.where for job in view.running] == ["job 43 RUNNING 3:12 on 4 nodes"]
    assert (view.trainings[0].state, view.trainings[0].about) == ("running", "is being started")
    follower.queue.jobs[1] = replace(follower.queue.jobs[1], state="PENDING")
    assert (follower.look().trainings[0].state, follower.look().trainings[0].about) == ("waiting", "")
    train(tmp_path, "sft", 20, 90)  # it was requeued after 20 steps
    assert (follower.look().trainings[0].state, follower.look().trainings[0].done) == ("waiting", 20)


def test_slurm_is_asked_in_a_thread_and_no_answer_is_no_fault(tmp_path: Path, monkeypatch):
    said = "7|PENDING|0:00|1|Priority|run|/x|rule_sft\n8|PENDING|0:00|1|Priority|run|/y|rule_lora\n"
    monkeypatch.setattr(slurm, "ask", lambda *_: said)
    follower = Follower(Path("/x"))
    follower.queue._ask()
    assert [job.rule for job in follower.queue.jobs or ()] == ["sft"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue there
    follower.queue._ask()
    assert follower.queue.jobs is None

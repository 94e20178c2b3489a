"""What a run says on the terminal: a line for a job that starts or ends, and why one failed."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snaketron.graph.lines import Lines

import pytest
from snakemake_interface_logger_plugins.common import LogEvent

COMMAND = """python scripts/sft.py --settings '{"stage":"sft","train_iters":60}' --log-file logs/sft.log"""


def record(text: str = "", event: LogEvent | None = None, **extra: Any) -> logging.LogRecord:
    """A message as Snakemake sends it to its loggers."""
    made = logging.LogRecord("snakemake", logging.INFO, "", 0, text, None, None)
    made.__dict__.update(extra, event=event)
    return made


def starts(lines: Lines, number: int, rule: str, *, local: bool = True, reason: str = "", **wildcards: str):
    extra = {"jobid": number, "rule_name": rule, "wildcards": wildcards, "reason": reason}
    return lines.of(record(event=LogEvent.JOB_INFO, local=local, indent=False, **extra))


def fails(lines: Lines, number: int, log: Path | str, *, indent: bool = False, why: str | None = None, **aux):
    extra = {"jobid": number, "rule_name": "sft", "log": [str(log)], "shellcmd": COMMAND, "rule_msg": why}
    return lines.of(record(event=LogEvent.JOB_ERROR, indent=indent, aux=aux, **extra))


def exits(lines: Lines, status: int) -> None:
    """The message in which Snakemake tells the whole command and its status."""
    text = f"RuleException:\nCalledProcessError in file sft.smk, line 26:\nCommand 'set -euo; {COMMAND}'"
    assert lines.of(record(f"{text} returned non-zero exit status {status}.", LogEvent.ERROR)) is None


def ends(lines: Lines) -> str | None:
    assert lines.of(record("Complete log(s): .snakemake/log/all.log")) is None
    return lines.of(record("WorkflowError:\nAt least one job did not complete successfully.", LogEvent.ERROR))


@pytest.fixture
def lines() -> Lines:
    """The lines of a run of two jobs, after its table of jobs."""
    lines = Lines()
    assert lines.of(record("job count\nsft 1\ntotal 2", LogEvent.RUN_INFO, stats={"sft": 1, "total": 2}))
    return lines


def without_time(text: str | None) -> str:
    assert text
    return re.sub(r"\[\d\d:\d\d:\d\d\] |(?<=after )\d\d:\d\d:\d\d", "", text)


def test_a_job_that_starts_or_ends_is_a_line(lines: Lines):
    assert without_time(starts(lines, 7, "tokenize_shard", corpus="docs", shard="part_0")) == (
        "tokenize_shard docs part_0 starts"
    )
    done = lines.of(record("Finished jobid: 7", LogEvent.JOB_FINISHED, job_id=7))
    assert without_time(done) == "tokenize_shard docs part_0 is done after  (1 of 2)"
    for chatter in (
        record("Select jobs to execute..."),
        record("Execute 1 jobs...", LogEvent.JOB_STARTED),
        record("1 of 2 steps (50%) done", LogEvent.PROGRESS),
        record(f"Shell command: {COMMAND}", LogEvent.SHELLCMD),
    ):
        assert lines.of(chatter) is None


def test_an_error_of_the_configuration_comes_without_a_traceback(lines: Lines):
    message = "The configuration is wrong.\nsft.train_iter: unknown key; did you mean 'train_iters'?"
    of_snakemake = (
        f'WorkflowError in file "/my run/Snakefile", line 88:\n{message}\n'
        '  File "/my run/Snakefile", line 88, in <module>'
    )
    assert lines.of(record(of_snakemake, LogEvent.ERROR)) == f"error: {message}"
    unknown = "no phase of pretraining is called 'foo'. Known: broad, focused"
    assert lines.of(record(f"WorkflowError:\n{unknown}", LogEvent.ERROR)) == f"error: {unknown}"
    # Elsewhere the place says what to mend.
    of_a_rule = 'WorkflowError in rule sft in file "/my run/rules/sft.smk", line 3:\nno such thing'
    assert lines.of(record(of_a_rule, LogEvent.ERROR)) == of_a_rule


def test_on_slurm_the_line_comes_with_the_number_of_the_job(lines: Lines):
    assert starts(lines, 7, "sft", local=False) is None
    submitted = record("Job 7 has been submitted with SLURM jobid 42 (log: logs/slurm/42.log).")
    assert without_time(lines.of(submitted)) == "sft is submitted as Slurm job 42"


def test_a_group_of_jobs_is_one_line_when_it_is_submitted(lines: Lines):
    """Snakemake names all groups before it submits the first one, under the id of a member."""

    def member(rule: str, number: int) -> SimpleNamespace:
        return SimpleNamespace(rule=SimpleNamespace(name=rule), uuid=lambda: f"{rule}-{number}")

    for rule, size in (("render_chat", 8), ("pack_sft", 3)):
        members = [member(rule, number) for number in range(size)]
        assert lines.of(record("Group job", LogEvent.GROUP_INFO, group_id=rule, jobs=members)) is None

    def submitted(number: str, job: int) -> str | None:
        return lines.of(record(f"Job {number} has been submitted with SLURM jobid {job} (log: {job}.log)."))

    said = [without_time(submitted("render_chat-5", 42)), without_time(submitted("pack_sft-2", 43))]
    assert said == [
        "a group of 8 render_chat is submitted as Slurm job 42",
        "a group of 3 pack_sft is submitted as Slurm job 43",
    ]


def test_a_dry_run_gives_the_reason_of_each_job():
    lines = Lines(dryrun=True)
    missing = "Missing output files: ckpt/sft"
    assert starts(lines, 0, "sft", reason=missing) == f"sft: {missing}"
    forced = "sft: Asked for, or not completed the last time"
    assert starts(lines, 0, "sft", reason="Forced execution") == forced
    long = starts(lines, 1, "blend", reason=f"Updated input files: {'a.json, ' * 100}")
    assert long and len(long) < 200 and long.endswith("...")


def test_a_stop_is_a_stop_and_no_error(lines: Lines, tmp_path: Path):
    starts(lines, 0, "sft")
    stopping = lines.of(record("Terminating processes on user request, this might take some time."))
    assert without_time(stopping) == "Stopping, as asked"
    exits(lines, 130)
    assert without_time(fails(lines, 0, tmp_path / "sft.log")) == "sft has stopped"
    assert ends(lines) == "Stopped; 0 of 2 jobs are done. Run the same command again to continue."


def test_sigterm_is_a_stop_that_waits_for_jobs(lines: Lines):
    """Snakemake says so whenever one of them ends."""
    starts(lines, 0, "sft")
    waiting = record("Will exit after finishing currently running jobs (scheduler).")
    assert without_time(lines.of(waiting)) == "Stopping, as asked, when the jobs that run have ended"
    lines.of(record(event=LogEvent.JOB_FINISHED, job_id=0))
    assert lines.of(waiting) is None
    assert ends(lines) == "Stopped; 1 of 2 jobs are done. Run the same command again to continue."


def test_a_python_that_ctrl_c_met_before_its_program_has_stopped(
    lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It says `Fatal Python error: init_import_site` and ends with 1, and the run was called a failed one."""
    begun, unbegun = tmp_path / "begun.log", tmp_path / "unbegun.log"
    begun.write_text("$ python\nerror: no space left\n")
    unbegun.write_text("$ python\n")
    starts(lines, 0, "sft")
    exits(lines, 1)
    assert without_time(fails(lines, 0, unbegun)).startswith("sft has failed")
    lines.failed.clear()
    monkeypatch.setattr("snaketron.graph.process._interrupts", [2])
    assert without_time(fails(lines, 0, unbegun)) == "sft has stopped"
    assert ends(lines) == "Stopped; 0 of 2 jobs are done. Run the same command again to continue."
    assert without_time(fails(lines, 0, begun)).startswith("sft has failed")


def test_a_training_that_was_stopped_elsewhere_is_no_error_either(lines: Lines, tmp_path: Path):
    """Somebody stopped the training by scancel, say, and nobody told this Snakemake."""
    log = tmp_path / "sft.log"
    log.write_text(
        "$ python\n2026-11-28 15:37:35,309 sft: stopped by SIGTERM after step 21; run the same ...\n"
    )
    starts(lines, 0, "sft")
    assert without_time(fails(lines, 0, log)) == "sft has stopped"


def test_a_failed_job_shows_its_status_and_the_end_of_its_log(lines: Lines, tmp_path: Path):
    log = tmp_path / "sft.log"
    log.write_text("\n".join([f"$ {COMMAND}", *(f"line {i}" for i in range(30)), "error: no space left"]))
    starts(lines, 0, "sft")
    exits(lines, 1)
    said = without_time(fails(lines, 0, log)).splitlines()
    assert said[0] == "sft has failed (exit status 1)"
    assert said[1:-1] == [*(f"  | line {i}" for i in range(16, 30)), "  | error: no space left"]
    assert said[-1] == f"  Its log, which begins with its command: {log}"
    assert ends(lines) == (
        "Failed: sft; 0 of 2 jobs are done. All that Snakemake said: .snakemake/log/all.log"
    )


INNER = """
SNAKEMAKE
=========
  Date: 2026-11-28 19:38:34
  Host: vm
  Config file(s): []

Building DAG of jobs...
Provided cores: 2
Select jobs to execute...
Execute 1 jobs...

[Sat Nov 28 19:38:34 2026]
localrule sft:
    output: ckpt/sft
    resources: mem_mb=4000, runtime=10
slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.
RuleException:
CalledProcessError in file "sft.smk", line 37:
Command 'set -euo pipefail; python scripts/sft.py' died with <Signals.SIGKILL: 9>.
[Sat Nov 28 19:38:55 2026]
Error in rule sft, jobid: 0
    shell:
"""


def test_of_the_log_of_a_slurm_job_lines_of_the_inner_snakemake_are_left_out(lines: Lines, tmp_path: Path):
    log = tmp_path / "7.log"
    log.write_text(INNER)
    starts(lines, 1, "sft", local=False)
    _, *shown = without_time(fails(lines, 1, log)).splitlines()
    assert shown == [
        "  | slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.",
        f"  Its log, which begins with its command: {log}",
    ]


def test_a_job_that_is_tried_again_is_named(lines: Lines):
    """Snakemake gives its own number of the job, which nobody knows."""
    starts(lines, 7, "sft", local=False)
    assert without_time(lines.of(record("Trying to restart job 7."))) == "sft is tried again"
    group = "Trying to restart job 0b44d4a0-7c9e-4b4e-9f3c-3e1f6a7e5d10."
    assert without_time(lines.of(record(group))) == "a group of jobs is tried again"


def test_a_job_that_succeeds_at_a_second_try_is_not_among_those_that_failed(lines: Lines, tmp_path: Path):
    for number, rule in ((0, "sft"), (1, "lora"), (0, "sft")):
        starts(lines, number, rule)
        if number == 1 or not lines.failed:
            fails(lines, number, tmp_path / "absent.log")
    assert lines.failed == ["sft", "lora"]
    lines.of(record(event=LogEvent.JOB_FINISHED, job_id=0))
    assert (ends(lines) or "").startswith("Failed: lora; 1 of 2 jobs are done.")


def test_what_the_executor_knows_about_a_failure_is_told(lines: Lines, tmp_path: Path):
    said = fails(
        lines, 3, tmp_path / "absent.log", why="Slurm job 42 was cancelled by ada", external_jobid=42
    )
    assert without_time(said).splitlines() == [
        "sft has failed: Slurm job 42 was cancelled by ada",
        f"  Its log, which begins with its command: {tmp_path}/absent.log",
    ]


def test_a_run_that_failed_before_a_job_could_begin_has_not_stopped(lines: Lines):
    said = "Error in sft: Slurm has refused it: invalid account."
    assert lines.of(record(said)) == said
    assert (ends(lines) or "").startswith("Failed: see above; 0 of 2 jobs are done.")


def test_of_a_failed_group_only_the_members_that_failed_are_shown(lines: Lines, tmp_path: Path):
    good, bad = tmp_path / "good.log", tmp_path / "bad.log"
    good.write_text("$ python\n3 documents\n")
    bad.write_text("$ python\nerror: a.jsonl: line 3\n")
    members = [{"rule_name": "render_chat"}, {"rule_name": "render_chat"}]
    group = record("Error in group a", LogEvent.GROUP_ERROR, job_error_info=members, aux_logs=["42.log"])
    assert without_time(lines.of(group)).splitlines() == [
        "a group of 2 render_chat has failed",
        "  Log of its Slurm job: 42.log",
    ]
    assert fails(lines, 1, good, indent=True) is None
    assert "  | error: a.jsonl: line 3" in without_time(fails(lines, 2, bad, indent=True))


def test_a_group_that_succeeds_at_a_second_try_is_not_among_those_that_failed(lines: Lines):
    for number in (1, 2):
        starts(lines, number, "render_chat", local=False, shard=str(number))
    members = [{"rule_name": "render_chat", "jobid": number} for number in (1, 2)]
    lines.of(record("Error in group a", LogEvent.GROUP_ERROR, job_error_info=members, aux_logs=[]))
    assert lines.failed == ["a group of 2 render_chat"]
    lines.of(record(event=LogEvent.JOB_FINISHED, job_id=1))
    assert lines.failed == ["a group of 2 render_chat"]
    lines.of(record(event=LogEvent.JOB_FINISHED, job_id=2))
    assert lines.failed == []


def test_a_finished_run_says_so(lines: Lines):
    for number in (0, 1):
        starts(lines, number, "sft")
        lines.of(record(event=LogEvent.JOB_FINISHED, job_id=number))
    assert lines.of(record("Elapsed time: 0:07:55.38")) == "All jobs are done, after 0:07:55."


def test_jobs_for_which_no_changed_key_is_noticed_are_told(lines: Lines):
    """Snakemake says that in words of its own, after 'Nothing to be done'."""
    said = (
        "2 jobs have missing provenance/metadata so that it in part cannot be used to trigger re-runs.\n"
        "Rules with missing metadata: sft tokenize_shard"
    )
    assert lines.of(record(said)) == (
        "Of 2 finished jobs (sft tokenize_shard) Snakemake has no notes, as in a copy without .snakemake: "
        "keys that were changed since do not make them run again; -R RULE does"
    )


def test_other_messages_are_passed_on(lines: Lines):
    for text in (
        "Nothing to be done (all requested files are present and up to date).",
        "To download: 3 files",
    ):
        assert lines.of(record(text)) == text

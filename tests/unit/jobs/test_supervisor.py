"""The supervisor of a training, with real processes that do next to nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.config import load
from snaketron.jobs import heartbeat
from snaketron.jobs.version import Version
from snaketron.settings.training import run_settings

import psutil
import pytest

TOY = Path(__file__).parent / "toy_training.py"


class Toy:
    """A version directory and the training in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def command(self, plan: dict[str, str], processes: int = 2, **keys: Any) -> list[str]:
        pretrain = {"parallel": {"data_parallel_size": processes}, "global_batch_size": 8, **keys}
        settings = run_settings(load({"pretrain": pretrain}, {}), "pretrain/broad").model_dump_json()
        return [sys.executable, str(TOY), str(self.directory), settings, json.dumps(plan)]

    def run(self, plan: dict[str, str] | None = None, attempt: int = 1, **keys: Any) -> tuple[int, str]:
        """Status and output of a run."""
        environment = os.environ | {"ATTEMPT": str(attempt)}
        command = self.command(plan or {}, **keys)
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )
        return done.returncode, done.stdout

    def start(self, plan: dict[str, str] | None = None, **keys: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(plan or {}, **keys), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def attempts(self) -> list[tuple[int, int, str | None]]:
        """(from step, to step, outcome) of each."""
        return [
            (a["from_iteration"], a["iteration"], a["outcome"])
            for a in files.read_json(self.directory / "attempts.json")
        ]

    def environment(self, rank: int) -> dict[str, str]:
        return json.loads((self.directory / f"environment_{rank}.json").read_text())

    def has_done(self, step: int, processes: int = 2) -> Callable[[], bool]:
        """Whether all processes are past a step: one that is not could stop after it already."""
        return lambda: len([*self.directory.glob(f"steps/*_{step}_?")]) == processes


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return Toy(tmp_path / "version")


def wait_for(reached: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_each_process_knows_its_place(toy: Toy):
    status, _ = toy.run(cpus_per_task=3)
    assert status == 0
    assert toy.attempts == [(0, 12, "finished")]
    for rank in (0, 1):
        environment = toy.environment(rank)
        expected = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}
        assert {name: environment[name] for name in expected} == expected
        assert environment["MASTER_ADDR"] == "127.0.0.1" and int(environment["MASTER_PORT"]) > 0


def test_what_was_finished_starts_nothing(toy: Toy):
    toy.run()
    status, output = toy.run()
    assert (status, len(toy.attempts)) == (0, 1)
    assert "these settings were trained before" in output


def test_a_failed_process_is_reported_and_all_start_again_from_the_last_checkpoint(toy: Toy):
    status, output = toy.run({"1:1:6": "raise"})
    assert status == 0
    assert toy.attempts == [(0, 5, "failed"), (4, 12, "finished")]
    assert "toy: rank 1 on " in output and "failed after step 5\nTraceback" in output
    assert "ValueError: the gradient is not finite after step 5; starting again from step 4\n" in output
    assert "toy: starts (2 processes on 1 node)\n" in output
    assert "toy: starts again, after step 4 (2 processes on 1 node)\n" in output


def test_the_same_failure_twice_ends_it_with_its_error(toy: Toy):
    status, output = toy.run({"1:0:6": "raise", "2:0:6": "raise", "3:0:6": "raise"})
    assert status == 1
    assert toy.attempts == [(0, 5, "failed"), (4, 5, "failed")]
    last = output.splitlines()[-1]
    assert last == (
        "error: toy: failed twice in the same way after step 5: ValueError: the gradient is not finite"
    )


def test_a_person_may_try_again_after_that_and_snakemake_may_not(toy: Toy):
    toy.run({"1:0:6": "raise", "2:0:6": "raise"})
    status, output = toy.run({}, attempt=2)
    assert status == 1 and "failed twice in the same way" in output and len(toy.attempts) == 2
    assert toy.run()[0] == 0
    assert toy.attempts[2:] == [(4, 12, "finished")]


def test_failures_without_progress_are_bounded(toy: Toy):
    """One at each of the steps 1, 2 and 3, none of which is saved."""
    plan = {"1:0:1": "raise", "2:0:2": "raise", "3:0:3": "raise"}
    status, output = toy.run(plan, max_restarts=2)
    assert status == 1
    assert toy.attempts == [(0, 0, "failed"), (0, 1, "failed"), (0, 2, "failed")]
    assert "is not finite before the first step; starting again from the beginning\n" in output
    assert (
        "error: toy: 3 starts in a row ended without a first checkpoint (max_restarts 2); the last "
        "one: ValueError: the gradient is not finite\n"
    ) in output


def test_failures_with_progress_between_them_are_not(toy: Toy):
    plan = {"1:0:5": "raise", "2:1:9": "raise", "3:0:12": "raise"}
    assert toy.run(plan, max_restarts=1)[0] == 0
    assert toy.attempts == [(0, 4, "failed"), (4, 8, "failed"), (8, 11, "failed"), (8, 12, "finished")]


def test_what_is_done_for_good_without_a_checkpoint_is_progress(toy: Toy, monkeypatch: pytest.MonkeyPatch):
    """As the parts of an evaluation, which gave up when four jobs had ended at their time limit."""
    monkeypatch.setenv("EACH_STEP", "counts")
    assert toy.run({"1:0:2": "raise", "2:1:3": "raise"}, max_restarts=0)[0] == 0
    assert [outcome for _, _, outcome in toy.attempts] == ["failed", "failed", "finished"]


def test_what_the_user_must_change_is_not_tried_again(toy: Toy):
    status, output = toy.run({"1:1:2": "refuse"})
    assert (status, toy.attempts) == (1, [(0, 1, "failed")])
    assert output.splitlines()[-1] == "error: data/blend.json: no such file"
    assert "Traceback" not in output


def test_a_killed_process_is_named_and_replaced(toy: Toy):
    status, output = toy.run({"1:1:6": "killed"})
    assert (status, toy.attempts) == (0, [(0, 5, "failed"), (4, 12, "finished")])
    assert "a process was killed by SIGKILL (out of memory?) after step 5; starting again" in output


def test_a_killed_process_is_named_and_not_the_one_that_noticed_it(toy: Toy):
    status, output = toy.run({"1:1:6": "killed", "1:0:6": "notice"})
    assert status == 0
    assert (
        "a process was killed by SIGKILL (out of memory?), of which another one noticed: RuntimeError: "
        "Connection closed by peer [127.0.0.1]:51097 after step 5; starting again"
    ) in output


def test_a_process_that_died_is_named_and_not_the_one_that_was_killed_after_it(toy: Toy):
    """In NCCL the other one waits on: that it was killed says nothing, and least of all of memory."""
    status, output = toy.run({"1:1:6": "abort", "1:0:6": "hang"})
    assert (status, toy.attempts) == (0, [(0, 5, "failed"), (4, 12, "finished")])
    assert "toy: a process was killed by SIGABRT after step 5; starting again from step 4\n" in output


def test_processes_that_hang_are_killed_and_replaced(toy: Toy):
    """The time out is longer than a start takes on a busy machine, because a start is silent too."""
    status, output = toy.run({"1:0:7": "hang"}, step_timeout=30)
    assert (status, toy.attempts) == (0, [(0, 6, "hung"), (4, 12, "finished")])
    where = "rank 0 after step 6 in run (log.py, go_wrong); rank 1 after step 6 in run (log.py, train)"
    assert f"no step within step_timeout (30 s; {where}) after step 6; starting again from step 4" in output
    assert re.search(
        r"toy: rank 0 on \S+ was here after step 6\n  File .*in go_wrong\n    time.sleep", output, re.S
    )


def test_of_processes_that_never_began_it_says_how_to_find_out_why(toy: Toy):
    """As where NCCL takes an interface that leads nowhere."""
    _, output = toy.run({"1:0:1": "hang"}, step_timeout=30)
    where = "rank 0 before the first step in run (log.py, go_wrong); rank 1 before the first step in run"
    assert f"no step within step_timeout (30 s; {where}" in output
    advice = "; scripts/doctor.py tries whether the processes reach each other) before the first step"
    assert f"{advice}; starting again from the beginning" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_the_next_run_goes_on(toy: Toy, number: signal.Signals):
    with toy.start({"1:0:6": "wait"}) as process:
        wait_for(toy.has_done(5))
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name} after step 6; run the same command again" in output
    assert toy.run()[0] == 0
    assert toy.attempts == [(0, 6, "stopped"), (6, 12, "finished")]


def test_processes_that_were_told_alone_save_and_are_not_started_again(toy: Toy):
    """As when Slurm pre-empts a job: it signals the processes of a step, and not who waits for them."""
    with toy.start({"1:0:6": "wait"}) as process:
        wait_for(toy.has_done(5))
        for rank in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # the one before has told it, and it has ended
                rank.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 6; run the same command again" in output
    assert toy.attempts == [(0, 6, "stopped")]


def test_a_second_signal_does_not_wait(toy: Toy):
    with toy.start({"1:0:3": "hang"}) as process:
        wait_for(toy.has_done(2))
        process.send_signal(signal.SIGINT)
        assert process.stdout and any("finishing the step and saving" in line for line in process.stdout)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
    assert process.returncode == 130


def test_processes_of_a_killed_supervisor_save_and_let_go(toy: Toy):
    with toy.start({"1:1:3": "wait"}) as process:
        wait_for(toy.has_done(2))
        ranks = psutil.Process(process.pid).children()
        process.kill()
        gone, alive = psutil.wait_procs(ranks, timeout=300)
    assert len(gone) == 2 and not alive
    (lost,) = toy.attempts
    assert lost == (0, 0, None)
    assert toy.run()[0] == 0
    assert toy.attempts == [lost, (3, 12, "finished")]


def test_who_comes_while_it_runs_is_sent_away(toy: Toy):
    with toy.start({"1:0:2": "wait"}) as process:
        beats = Version(toy.directory).heartbeat
        wait_for(lambda: bool(heartbeat.read(beats)))  # the other rank writes it
        status, output = toy.run()
        process.terminate()
        process.communicate(timeout=300)
    assert status == 1 and f"process {process.pid} on " in output and "is training here" in output
    assert process.returncode == 143 and toy.attempts == [(0, 2, "stopped")]


def test_who_was_taken_over_stops_before_it_writes(toy: Toy):
    """As when Slurm lost a node, which lives on, and runs the job again on another one."""
    with toy.start({"1:0:3": "pause"}) as process:
        wait_for(toy.has_done(2))
        other = {"token": "other", "process": 1, "host": "node7", "job": "99"}
        files.write_json(Version(toy.directory).owner, other)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"{toy.directory}: taken over by process 1 on node7, Slurm job 99; this training stops" in output


def test_several_nodes_need_slurm(toy: Toy):
    settings = {"pretrain": {"parallel": {"data_parallel_size": 4}, "global_batch_size": 16}}
    run = run_settings(load(settings | {"cluster": {"tasks_per_node": 2}}, {}), "pretrain/broad")
    command = [sys.executable, str(TOY), str(toy.directory / "other"), run.model_dump_json(), "{}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "this training needs 2 nodes of 2 processes, and this is no Slurm job" in done.stderr

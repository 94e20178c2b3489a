"""The supervisor of a training, with real processes that do next to nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.config import Cluster, load
from snaketron.jobs import heartbeat, launch, slurm, supervisor
from snaketron.jobs.attempts import Attempts
from snaketron.jobs.version import Version
from snaketron.log import UserError
from snaketron.settings.training import run_settings
from snaketron.sizes.layout import layout

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


def test_processes_that_hang_are_killed_and_replaced(toy: Toy):
    """The time out is longer than a start takes on a busy machine, because a start is silent too."""
    status, output = toy.run({"1:0:7": "hang"}, step_timeout=30)
    assert (status, toy.attempts) == (0, [(0, 6, "hung"), (4, 12, "finished")])
    assert "no step within step_timeout (30 s) after step 6; starting again from step 4" in output


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


@pytest.mark.parametrize(
    ("cluster", "options", "command"),
    [
        ({}, [], ["python3", "scripts/sft.py", "--x"]),
        (
            {"container": "a.sif", "mounts": ["/0"], "gpus_per_node": 8},
            [],
            "apptainer exec --nv --bind=/0 --bind={here} --pwd={here} a.sif python scripts/sft.py --x",
        ),
        (
            {"container": "a.sqsh", "container_runtime": "pyxis", "mounts": ["/0", "/a:{here}/b"]},
            [
                "--container-image=a.sqsh",
                "--container-mounts=/0:/0,{here}:{here},/a:{here}/b",
                "--container-workdir={here}",
            ],
            "python scripts/sft.py --x",
        ),
        (
            {"container": "a.image", "container_runtime": "charliecloud", "mounts": ["/0"]},
            [],
            "ch-run --set-env --bind=/0 --bind={here} --cd={here} a.image -- python scripts/sft.py --x",
        ),
    ],
)
def test_a_container_is_put_around_the_processes_and_not_around_srun(cluster, options, command):
    here = str(Path.cwd())
    words = command.format(here=here).split() if isinstance(command, str) else command
    cluster |= {"mounts": [mount.format(here=here) for mount in cluster.get("mounts", [])]}
    found = launch.containerized(["python3", "scripts/sft.py", "--x"], Cluster(**cluster))
    assert found == ([option.format(here=here) for option in options], words)


def test_the_environment_of_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the user has set stays, what the configuration says goes over it, secrets come last."""
    secrets = tmp_path / "secrets"
    secrets.write_text("# of the team\nWANDB_API_KEY=abc=def\n\n")
    secrets.chmod(0o600)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    cluster = {
        "environment": {"NCCL_DEBUG": "INFO", "TORCH_NCCL_AVOID_RECORD_STREAMS": "0"},
        "cache_dir": str(tmp_path),
        "secrets_file": str(secrets),
    }
    found = launch.environment(run_settings(load({"cluster": cluster}, {}), "pretrain/broad"))
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in found
    assert found["NCCL_DEBUG"] == "INFO" and found["TORCH_NCCL_AVOID_RECORD_STREAMS"] == "0"
    assert found["TRITON_CACHE_DIR"] == f"{tmp_path}/snaketron-{os.getuid()}/triton"
    assert found["WANDB_API_KEY"] == "abc=def"


def test_threads_that_wait_leave_the_core_to_others_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    found = [
        launch.environment(run_settings(load({"cluster": {"gpus_per_node": gpus}}, {}), "pretrain/broad"))
        for gpus in (0, 8)
    ]
    assert [of.get("OMP_WAIT_POLICY") for of in found] == ["PASSIVE", None]


def test_in_an_image_caches_lie_in_its_own_tmp_and_charliecloud_has_the_user(monkeypatch: pytest.MonkeyPatch):
    """$TMPDIR is a directory of the host, which the image need not see; cron and CI set no USER."""
    for name in ("TRITON_CACHE_DIR", "USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", "/local/job7")
    monkeypatch.setattr("tempfile.tempdir", None)
    cluster = {"container": "image", "container_runtime": "charliecloud"}
    found = launch.environment(run_settings(load({"cluster": cluster}, {}), "pretrain/broad"))
    assert found["TRITON_CACHE_DIR"] == f"/tmp/snaketron-{os.getuid()}/triton"
    assert found["USER"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "was killed by SIGKILL (out of memory?)"),
        (137, "was killed by SIGKILL (out of memory?)"),
        (-11, "was killed by SIGSEGV"),
        (3, "ended with status 3"),
    ],
)
def test_how_a_process_ended_in_words(status: int, words: str):
    assert supervisor._ended_with(status) == words


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2-00:00:01", 172801.0),
        ("4:00:00", 14400.0),
        ("1:05", 65.0),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_times_of_squeue(text: str, seconds: float | None):
    assert slurm.parse_time(text) == seconds


def test_an_attempt_that_ended_without_a_word_counts(tmp_path: Path):
    """As when a node is lost: nobody could note how it ended."""
    for _ in range(2):
        Attempts("toy", tmp_path / "attempts.json", 1).begin(0, "7")
    with pytest.raises(UserError, match=r"toy: 2 starts in a row .* it ended without a word"):
        Attempts("toy", tmp_path / "attempts.json", 1).check(0)
    Attempts("toy", tmp_path / "attempts.json", 1).check(0)  # asked for by a person


@pytest.mark.parametrize(
    ("parallel", "cluster", "expected"),
    [
        ({}, {}, (1, 1, 0)),
        ({"data_parallel_size": 2}, {}, (1, 2, 0)),
        ({}, {"gpus_per_node": 8}, (1, 1, 1)),
        ({"tensor_model_parallel_size": 4, "data_parallel_size": 8}, {"gpus_per_node": 8}, (4, 8, 8)),
        ({"data_parallel_size": 4}, {"gpus_per_node": 2}, (2, 2, 2)),
        ({"data_parallel_size": 2}, {"tasks_per_node": 1}, (2, 1, 0)),
    ],
)
def test_the_layout_follows_from_the_parallel_sizes(parallel, cluster, expected):
    pretrain = {"parallel": parallel, "global_batch_size": 64, "micro_batch_size": 1}
    model = {"num_query_groups": 4, "mamba_num_groups": 4}
    config = load({"pretrain": pretrain, "cluster": cluster, "model": model}, {})
    assert layout(config.pretrain, config.cluster) == expected


def test_a_training_on_a_node_that_flaps_is_given_up_on(tmp_path: Path):
    """Slurm requeues it each time, before a checkpoint. A stop that a person asked for is not counted."""
    path = tmp_path / "attempts.json"
    for outcome in ("stopped", "requeued", "requeued"):
        attempts = Attempts("toy", path, 1)
        attempts.check(0)
        attempts.begin(0, "7")
        attempts.end(outcome, 0)
    with pytest.raises(UserError, match="2 starts in a row ended without a first checkpoint"):
        Attempts("toy", path, 1).check(0)


@pytest.mark.parametrize(
    ("restarts", "time", "requeued", "pre_empted"),
    [("2", "N/A", True, False), ("1", "N/A", False, False), ("1", "2026-11-28T18:34:20", False, True)],
)
def test_slurm_says_that_it_runs_a_job_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restarts: str,
    time: str,
    requeued: bool,
    pre_empted: bool,
):
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\ncase $* in *RestartCnt*) echo {restarts};; *) echo {time};; esac\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = slurm.Job("7", of_rule=True, restarts=1)
    assert (slurm.is_requeued(job), slurm.is_preempted(job)) == (requeued, pre_empted)


def test_processes_meet_at_a_port_that_no_connection_is_given(monkeypatch: pytest.MonkeyPatch):
    """One at which somebody listens already is passed over."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split())
    taken = launch._free_port()
    assert not low <= taken <= high
    with socket.create_server(("", taken)):
        free = launch._free_port()
        monkeypatch.setattr(random, "sample", lambda *_: [taken, free])
        assert launch._free_port() == free

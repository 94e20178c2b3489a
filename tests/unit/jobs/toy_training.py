"""A training without a model, for tests of its supervisor: python toy_training.py DIRECTORY SETTINGS PLAN

It does 12 steps of 20 ms, saves every 4, and waits for the other ranks at each step, through files. PLAN maps
"attempt:rank:step" to what goes wrong there: an action of `go_wrong`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from snaketron.files import write_text
from snaketron.jobs import launch, supervisor
from snaketron.jobs.heartbeat import Heartbeat
from snaketron.jobs.owner import TOKEN, Holder, check_owner
from snaketron.jobs.version import Version
from snaketron.log import UserError, run
from snaketron.settings.training import RunSettings

STEPS, SAVE_INTERVAL = 12, 4


def main() -> int:
    version, settings, plan = Version(Path(sys.argv[1])), sys.argv[2], json.loads(sys.argv[3])
    if launch.is_rank():
        launch.join()
        with launch.telling(version.failures):
            return train(version, plan)
    settings = RunSettings.model_validate_json(settings)
    attempt = int(os.environ.get("ATTEMPT", 1))
    steps = version.directory / "steps"
    saved = (lambda: len([*steps.iterdir()]) if steps.exists() else 0) if "EACH_STEP" in os.environ else None
    return supervisor.supervise("toy", version, settings, attempt=attempt, saved=saved)


def train(version: Version, plan: dict[str, str]) -> int:
    directory, rank, world = version.directory, launch.rank(), int(os.environ["WORLD_SIZE"])
    attempt = len(json.loads(version.attempts.read_text()))
    write_text(directory / f"environment_{rank}.json", json.dumps(dict(os.environ)))
    stop: list[int] = []
    for number in launch.STOP_SIGNALS:
        signal.signal(number, lambda n, _: stop.append(n))
    heartbeat = Heartbeat(version.heartbeat, STEPS, writer=launch.is_writer())
    for step in range((version.latest_iteration() or 0) + 1, STEPS + 1):
        go_wrong(plan.get(f"{attempt}:{rank}:{step}"), stop, version)
        time.sleep(0.02)
        asked = bool(stop)
        write_text(directory / f"steps/{attempt}_{step}_{rank}", str(int(asked)))
        others = [directory / f"steps/{attempt}_{step}_{other}" for other in range(world)]
        while not all(other.exists() for other in others):
            time.sleep(0.002)
        asked = any(other.read_text() == "1" for other in others)
        check_owner(version)
        heartbeat.written = -1.0  # every step, however short
        heartbeat.beat(step)
        if rank == 0 and (step % SAVE_INTERVAL == 0 or asked):
            version.iteration_directory(step).mkdir(exist_ok=True)
            write_text(version.latest, str(step))
        if asked:
            return launch.SAVED
    if rank == 0:
        write_text(version.record, "{}")
    return 0


def go_wrong(how: str | None, stop: list[int], version: Version) -> None:
    match how:
        case None:
            return
        case "raise":
            raise ValueError("the gradient is not finite")
        case "notice":
            time.sleep(0.2)  # the other one is dead by now
            raise RuntimeError("Connection closed by peer [127.0.0.1]:51097")
        case "refuse":
            raise UserError("data/blend.json: no such file")
        case "wait":
            while not stop:
                time.sleep(0.002)
        case "pause":  # until another supervisor owns the version
            while (holder := Holder.of(version)) is None or holder.token == os.environ[TOKEN]:
                time.sleep(0.02)
        case "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, launch.STOP_SIGNALS)
            time.sleep(600)
        case "abort":
            os.abort()
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            raise ValueError(how)


if __name__ == "__main__":
    run(main)

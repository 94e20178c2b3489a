"""What a Slurm job costs beside its work, and how long a training takes to its first step.

    uv run python -m tests.benchmarks.slurm [--shards 24]

A Slurm of the tests is started. The shards are tokenized as single jobs and in groups, with the profile that
ships; "ratio" compares the lines of one run. Then a training runs on two nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import yaml
from tests.conftest import REPOSITORY, make_workspace
from tests.slurm.conftest import Slurm, Submitting


def overlay(directory: Path, shards: int) -> tuple[str, ...]:
    """A corpus of small files beside the micro configuration."""
    for shard in range(shards):
        rows = [json.dumps({"text": f"document {row} of shard {shard}"}) + "\n" for row in range(200)]
        (directory / f"part_{shard:03d}.jsonl").write_text("".join(rows))
    values = {"corpora": [{"name": "docs", "paths": [f"{directory}/*.jsonl"]}]}
    values["pretrain"] = {
        "phases": [{"name": "broad", "tokens": 12288, "blend": [{"corpus": "docs", "weight": 1.0}]}],
        "decay_tokens": 4096,
    }
    (directory / "bench.yaml").write_text(yaml.safe_dump(values))
    return ("tests/config/micro.yaml", "tests/slurm/two_nodes.yaml", str(directory / "bench.yaml"))


def run(slurm: Slurm, root: Path, overlays: tuple[str, ...], *arguments: str) -> tuple[float, float]:
    """Make targets in `root`; seconds, and CPU seconds of the jobs."""
    command = [sys.executable, *Submitting(root, overlays).command(*arguments)]  # a program without a mode
    before, began = cpu_seconds(slurm), time.monotonic()
    done = subprocess.run(command, cwd=root, env=slurm.environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return time.monotonic() - began, cpu_seconds(slurm) - before


def cpu_seconds(slurm: Slurm) -> float:
    """CPU seconds of all steps of all jobs, by Slurm's accounting."""
    total = 0.0
    for step in slurm.accounting("--allusers", "--starttime=00:00", columns=("JobID", "TotalCPU")):
        if "." in step["JobID"]:
            *rest, seconds = re.split("[-:]", step["TotalCPU"])
            total += float(seconds) + sum(
                int(value) * factor for value, factor in zip(reversed(rest), (60, 3600, 86400), strict=False)
            )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="slurm") as temporary:
        path, data = Path(temporary) / "cluster", Path(temporary) / "data"
        path.mkdir()
        data.mkdir()
        overlays = overlay(data, args.shards)
        with subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.cluster", str(path)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout and process.stdin
            if (said := process.stdout.readline()) != "ready\n":
                sys.exit(f"Slurm does not run here: {said}")
            try:
                measure(Slurm(path, process), Path(temporary), overlays, args.shards)
            finally:
                process.stdin.close()


def measure(slurm: Slurm, root: Path, overlays: tuple[str, ...], shards: int) -> None:
    print(f"{shards} shards of 200 short documents, {os.cpu_count()} cores\n")
    print("| submitted as | seconds | CPU s of the jobs | CPU s a shard | ratio |\n|---|--:|--:|--:|--:|")
    first = None
    ungrouped = ("--group-components", "tokens=1")
    for name, arguments in (("single jobs", ungrouped), ("groups of 8", ())):
        workspace = make_workspace(root / name.replace(" ", "_"))
        run(slurm, workspace.path, overlays, "data/tokenizer/tokenizer.json")
        seconds, cpu = run(slurm, workspace.path, overlays, "data/pretrain/broad/blend.json", *arguments)
        first = first or cpu
        print(f"| {name} | {seconds:.0f} | {cpu:.1f} | {cpu / shards:.2f} | {first / cpu:.1f} |", flush=True)
    run(slurm, workspace.path, overlays, "data/pretrain/broad/index")
    run(slurm, workspace.path, overlays, "ckpt/pretrain/broad")
    job = max(slurm.jobs(workspace), key=lambda job: job.id)
    (line,) = slurm.accounting(f"--jobs={job.id}", "-X", columns=("Submit", "Start", "End"))
    submit, start, end = (datetime.fromisoformat(line[name]) for name in ("Submit", "Start", "End"))
    log = (workspace.path / "ckpt/pretrain/broad/train.log").read_text()
    moments = [("the job starts", start)]
    for what, text in (
        ("its processes are started", "2 processes on"),
        ("the model is built", "parameters on this rank"),
        ("the first validation is done, the first step begins", " before the first step\n"),
        ("the checkpoint is published", " is ckpt/versions"),
    ):
        said = [row for row in log.splitlines(keepends=True) if text in row][-1]
        moments.append((what, datetime.strptime(said[:23], "%Y-%m-%d %H:%M:%S,%f")))
    print("\n| a training on two nodes | seconds after its submission |\n|---|--:|")
    for what, moment in [*moments, ("the job ends", end)]:
        print(f"| {what} | {(moment - submit).total_seconds():.0f} |")


if __name__ == "__main__":
    main()

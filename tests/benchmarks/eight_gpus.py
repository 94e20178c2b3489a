"""What needs several GPUs of one host: parity, speed, exchange, checkpoints, estimates.

    python -m tests.benchmarks.eight_gpus                        # all parts, on the GPUs that are there
    python -m tests.benchmarks.eight_gpus --parts 2 3 --seconds 580
    python -m tests.benchmarks.eight_gpus --tiny --parts 1 5     # on CPUs: the same code, small
    python -m tests.benchmarks.eight_gpus --parts 1 --shared     # the processes of a layout share a GPU
    python -m tests.benchmarks.eight_gpus --table one.json two.json

1  tests/gpu; layouts against one GPU (losses, gradient norms); a checkpoint of one layout goes on in another
2  Nano 30B whole, bf16 and fp8, random tokens and a text, and with evenly loaded experts
3  a quarter of Super: 22 layers, in three layouts, the same
4  where the time goes: kinds of kernels with the exchange of experts, no layers recorded, experts evenly
   loaded, dispatchers, 1 to 8 GPUs at the same work on each, sums of gradients, bubbles
5  checkpoints: how long a training stands still, bytes; a killed process and the first step after it
6  step time and memory against `sizes`: of all trainings of parts 2 to 5

Trainings are those of scripts/pretrain.py, as many at once as have GPUs of their own. What needs more GPUs or
memory than there is, is listed as not run, with the reason, as is what there is no time for. The first
weights are random, and so are routers.
Results are written after each training, below $OUT (or --out): eight_gpus.json, and a log for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from snaketron.config import Parallel
from snaketron.files import read_json, write_json
from snaketron.jobs.lines import read_metrics
from snaketron.sizes.layout import layout_words

import psutil
from tests.benchmarks import eight_gpus_rows as rows_of_parts
from tests.benchmarks import trainings
from tests.benchmarks.eight_gpus_rows import SMALL_SEATS, TOLERANCE, Row, missing, rows
from tests.benchmarks.gpu_training import VARIANTS
from tests.benchmarks.trainings import REPOSITORY, Training
from tests.seats import Seats, shared

# ----------------------------------------------------------------------------------------------- measuring


class Results:
    """What was found, in a file that is written anew after each training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def add(self, row: dict[str, Any]) -> None:
        with self.lock:
            self.rows.append(row)
            write_json(self.path, self.rows)
            print(json.dumps(row), flush=True)


def measure(row: Row, root: Path, there: int, tiny: bool, left: float) -> dict[str, Any]:
    """A row's training; that of part 5 has a process killed, and starts again by itself."""
    training, per_node = row.training, 0 if tiny else there
    about = {"part": row.part, "layout": layout_words(Parallel(**training.parallel)) or "one"}
    about |= {"like": row.like, "published": row.published, "precision": training.model["precision"]}
    about |= {"recompute": training.run.get("recompute", []), "goes_on_from": row.goes_on_from}
    if why := missing(row, there):
        return about | {"name": training.name, "not_run": why}
    if left < 30:
        return about | {"name": training.name, "not_run": f"{left:.0f} s were left"}
    limit = min(row.limit * (5 if tiny else 1), left)
    if row.part == 5:
        return about | kill(root, training, per_node, limit)
    return about | trainings.train(root, training, per_node, limit)


def kill(root: Path, training: Training, per_node: int, limit: float) -> dict[str, Any]:
    """Train, kill a process after the first checkpoint, and see how soon the next step is done."""
    found: dict[str, Any] = {"name": training.name, "gpus": training.gpus}
    process, deadline = trainings.start(root, training, per_node), time.monotonic() + limit
    killed, before, file, stalls = 0.0, 0, 0, [0.0]
    while process.poll() is None and time.monotonic() < deadline:
        here = trainings.version(root, training)
        latest, lines = here.latest_iteration() or 0, read_metrics(here.metrics)[0]
        if not killed and latest and lines[-1]["iteration"] > latest:
            checkpoint = here.iteration_directory(latest)
            found["checkpoint_gb"] = sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()) / 1e9
            stalls += [line["timing"]["checkpoint_seconds"] for line in lines if "timing" in line]
            ranks = [p for p in psutil.Process(process.pid).children() if "--settings" in p.cmdline()]
            ranks[0].send_signal(signal.SIGKILL)
            killed, before, file = time.monotonic(), latest, here.metrics.stat().st_ino
        # The next attempt writes its metrics into another file.
        elif killed and here.metrics.stat().st_ino != file and lines[-1]["iteration"] > before:
            found |= {"resumed_s": time.monotonic() - killed, "stood_still_s": max(stalls)}
            trainings.end(process, 0)
            return found | trainings.summary(training, lines)
        time.sleep(0.2)
    status = trainings.end(process, 0)
    said = (root / f"{training.name}.out").read_text(errors="replace")[-1500:]
    return found | {"failed": f"status {status}, {'killed' if killed else 'not killed'}: {said}"}


def tests(out: Path, left: float) -> Iterator[dict[str, Any]]:
    """tests/gpu on all GPUs, in two pytests beside each other, which mostly import: what each said last."""
    trained = "tests/gpu/test_training.py"
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-v", "-s"]
    chosen = {"training": [trained], "rest": ["tests/gpu", "--ignore", trained]}
    logs = {name: out / f"tests_{name}.log" for name in chosen}
    started = {}
    for name, files in chosen.items():
        with logs[name].open("w") as log:
            started[name] = subprocess.Popen(
                [*command, *files], cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT
            )
    deadline = time.monotonic() + min(440, left)
    for name, process in started.items():
        status = trainings.end(process, max(1.0, deadline - time.monotonic()))
        lines = logs[name].read_text(errors="replace").splitlines() or [""]
        within = [line.strip(".sFE") for line in lines if "within" in line or "differ by" in line]
        row = {"part": 1, "name": f"tests/gpu, {name}", "status": status, "said": lines[-1], "within": within}
        yield row


def variants(part: int, there: int, out: Path, left: float) -> Iterator[dict[str, Any]]:
    """Trainings of `gpu_training`: with evenly loaded experts, with no layers recorded, profiled."""
    named = rows_of_parts.variants(there)[part]
    about = [{"part": part, "name": name, "published": published} for name, published in named.items()]
    why = f"{left:.0f} s were left" if left < 30 else ""
    if unknown := [name for name in named if name not in VARIANTS]:
        why = f"no variant of this training is for {there} GPUs: {unknown[0]}"
    if why:
        yield from (row | {"not_run": why} for row in about)
        return
    out, seconds = out / f"variants_{part}", min(240, left)
    shutil.rmtree(out, ignore_errors=True)  # the results of another call
    out.mkdir()
    profiled = [name for name in named if name.endswith("_launched")]
    command = [sys.executable, "-m", "tests.benchmarks.gpu_training", *named, "--profile", *profiled]
    command += ["--seconds", str(seconds - 30)]
    with (out / "log").open("w") as log:
        environment = os.environ | {"OUT": str(out)}
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        trainings.end(process, seconds)
    file = out / "results.json"
    found = {row["name"]: row for row in (read_json(file) if file.exists() else [])}
    keys = ("tokens_per_second", "tflops", "step_ms", "peak_gib", "reserved_gib", "load_worst")
    for row in about:
        if (its := found.get(row["name"])) is None:
            yield row | {"failed": f"see {out / 'log'}"}
        else:
            yield row | {"variant": {key: its[key] for key in (*keys, "kinds_ms", "busy_ms") if key in its}}


def together(
    chosen: list[Row], seats: Seats, there: int, one: Callable[[Row], dict[str, Any]], results: Results
) -> None:
    """Train as many of the rows at once as there are seats."""

    def train(row: Row, gpus: list[int]) -> None:
        try:
            shown = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
            shown |= shared(row.training.gpus, len(gpus))
            training = dataclasses.replace(row.training, environment=row.training.environment | shown)
            results.add(one(dataclasses.replace(row, training=training)))
        finally:
            seats.give_back(gpus)

    with ThreadPoolExecutor(max(1, len(chosen))) as pool:
        started = []
        for row in chosen:
            gpus = [] if missing(row, there) else seats.take(row.training.gpus)
            started.append(pool.submit(train, row, gpus))
        for future in started:
            future.result()


def run(args: argparse.Namespace, results: Results) -> None:
    there = 8 if args.tiny or args.shared else gpu_count()
    root, out, deadline = args.directory, args.out, time.monotonic() + args.seconds
    root.mkdir(parents=True, exist_ok=True)
    chosen = [row for row in rows(args.parts, there, args.tiny, root) if args.only in row.training.name]
    trainings.prepare(root, [row.training for row in chosen if not missing(row, there)])
    if 1 in args.parts and not (args.tiny or args.shared) and args.only in "tests/gpu":
        for row in tests(out, deadline - time.monotonic()):
            results.add(row)
    for part in (2, 3, 4):
        if part in args.parts and not args.tiny and args.only in "variants":
            for row in variants(part, there, out, deadline - time.monotonic()):
                results.add(row)

    def one(row: Row) -> dict[str, Any]:
        return measure(row, root, there, args.tiny, deadline - time.monotonic())

    small = [row for row in chosen if row.part == 1]
    for goes_on in (False, True):  # those that go on from others wait for them
        some = [row for row in small if bool(row.goes_on_from) == goes_on]
        seats = Seats(1, SMALL_SEATS) if args.shared else Seats(there, 1 if args.tiny else SMALL_SEATS)
        together(some, seats, there, one, results)
    together([row for row in chosen if row.part != 1], Seats(there, 1), there, one, results)
    for log in [*root.glob("*.log"), *root.glob("*.out")]:
        shutil.copyfile(log, out / log.name.replace(" ", "_").replace(",", "").replace(":", ""))


def gpu_count() -> int:
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return 0
    return len(said.splitlines())


# ------------------------------------------------------------------------------------------------- reporting


def table(found: list[dict[str, Any]]) -> str:
    """Everything that was found, for people."""
    ran = [row for row in found if "losses" in row]
    by_name = {row["name"]: row for row in ran}
    lines: list[str] = []
    for row in ran:
        if other := by_name.get(row["like"]):
            lines = lines or ["", "| parity | losses (nats) | gradient norms | |", "|---|--:|--:|---|"]
            limits = TOLERANCE[row["precision"]]
            worst = differences(row, other)
            same = "same" if worst[0] < limits[0] and worst[1] < limits[1] else "DIFFERS"
            if row["went_on_from"] != row["goes_on_from"]:
                same = f"WENT ON FROM STEP {row['went_on_from']}"
            lines.append(f"| {row['name']} | {worst[0]:.1e} | {worst[1]:.1e} | {same} |")
    heads = "part, training, layout, recompute, tokens/s/GPU, TFLOP/s/GPU, published, step s, estimated, "
    heads += "GiB, estimated, fullest expert, last loss"
    timed = [row for row in ran if row["part"] != 1]
    if timed:
        lines += ["", f"| {heads.replace(', ', ' | ')} |", "|--:|---|---|---|" + "--:|" * 9]
    for row in timed:
        cells = [row["part"], row["name"], row["layout"], "+".join(row["recompute"])]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['tflops']:.0f}", row["published"]]
        cells += [f"{row[key]:.3f}" for key in ("step_s", "estimated_step_s")]
        cells += [f"{row[key]:.1f}" for key in ("peak_gib", "estimated_gib")]
        cells += [row["fullest_expert"], f"{row['losses'][-1]:.4f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for row in found:
        if "resumed_s" in row:
            lines += ["", f"{row['name']}: a checkpoint of {row['checkpoint_gb']:.2f} GB, still for "]
            lines[-1] += (
                f"{row['stood_still_s']:.2f} s at most; first step {row['resumed_s']:.1f} s after a SIGKILL"
            )
        if "variant" in row:
            lines += ["", f"{row['name']}: {row['variant']}, published: {row['published'] or 'nothing'}"]
        if "said" in row:
            lines += ["", f"{row['name']}: {row['said']}"]
    for key, word in (("failed", "FAILED"), ("not_run", "not run")):
        lines += [
            "",
            *(f"{word}: part {row['part']}, {row['name']}: {row[key]}" for row in found if key in row),
        ]
    return "\n".join(lines)


def differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of the losses, and of the gradient norms against their size."""
    losses = (abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=False))
    norms = (abs(x / y - 1) for x, y in zip(a["norms"], b["norms"], strict=False))
    return max(losses), max(norms)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", default="", help="trainings whose names hold this")
    parser.add_argument("--seconds", type=float, default=580, help="start nothing that ends after this")
    parser.add_argument(
        "--directory", type=Path, default=Path("/tmp/eight_gpus"), help="data and checkpoints"
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--tiny", action="store_true", help="up to eight processes on CPUs: parts 1 and 5")
    parser.add_argument("--shared", action="store_true", help="part 1 in up to eight processes on one GPU")
    parser.add_argument("--table", nargs="+", type=Path, metavar="JSON", help="the table of earlier results")
    args = parser.parse_args()
    if args.table:
        print(table([row for path in args.table for row in read_json(path)]))
        return 0
    if args.shared and (args.tiny or args.parts != [1]):
        parser.error("--shared is for part 1 on a GPU: --parts 1 --shared")
    if not args.tiny and not gpu_count():
        parser.error("nvidia-smi shows no GPU; --tiny runs on CPUs")
    results = Results(args.out / "eight_gpus.json")
    run(args, results)
    print(table(results.rows))
    return int(any("failed" in row for row in results.rows))


if __name__ == "__main__":
    sys.exit(main())

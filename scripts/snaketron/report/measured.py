"""What trainings took: speed, memory and time, against what the configuration said they would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from snaketron.jobs.attempts import Attempt
from snaketron.report.blocks import UNKNOWN, Block, Part, Table, Text, number
from snaketron.report.runs import Run, Stage
from snaketron.wording import short_duration


def across(
    caption: str,
    header: list[str],
    runs: Sequence[Run],
    rows: Callable[[Run], list[list[str]]],
    *,
    names: int = 1,
) -> list[Block]:
    """A table of the rows of all runs; none without rows.

    Where there are several runs, the rows that begin with the same word are beside each other, with the run.
    """
    several = len(runs) > 1
    of_runs = [(run.name, row) for run in runs for row in rows(run)]
    order = list(dict.fromkeys(row[0] for _, row in of_runs))
    of_runs.sort(key=lambda one: order.index(one[1][0]))
    found = [[row[0], run, *row[1:]] if several else row for run, row in of_runs]
    header = [header[0], "run", *header[1:]] if several else header
    return [Table(caption, header, found, names=names + several)] if found else []


def measured_part(runs: Sequence[Run]) -> Part:
    return Part("Throughput, memory and cost", [*_speed(runs), *_planned(runs), *_attempts(runs)])


def cost(stages: Sequence[Stage]) -> str:
    """What trainings cost, in hours of all processes."""
    spent = sum(stage.seconds * stage.processes for stage in stages) / 3600
    kinds = {str(stage.run["cluster"].get("gpu") or "") for stage in stages if stage.on_gpus}
    if not kinds:
        return f"{spent:,.2f} process hours on CPUs"
    named = ", ".join(sorted(kind for kind in kinds if kind))
    return f"{spent:,.1f} GPU hours" + (f" ({named})" if named else "")


def median_of(stage: Stage, key: str) -> float | None:
    found = stage.history.metrics.find("timing", key)
    return found.median if found else None


def _peak(stage: Stage) -> float | None:
    return max((value for _, value in stage.values("timing", "peak_memory_gib")), default=None)


def _speed(runs: Sequence[Run]) -> list[Block]:
    def rows(run: Run) -> list[list[str]]:
        found = []
        for stage in run.stages:
            spent = [stage.total("timing", f"{name}_seconds") for name in ("step", "data", "checkpoint")]
            found.append(
                [
                    stage.name,
                    f"{stage.processes:,}",
                    number(median_of(stage, "tokens_per_second_per_process"), 0),
                    number(median_of(stage, "tflops_per_process"), 3),
                    number(_peak(stage), 2),
                    *map(short_duration, spent),
                    short_duration(stage.seconds),
                    f"{stage.seconds * stage.processes / 3600:,.3f}",
                ]
            )
        return found

    header = ["training", "processes", "tokens/s of each", "model TFLOP/s of each", "peak GiB"]
    header += ["in steps", "waiting for data", "saving", "all attempts", "process hours"]
    return across("Measured; speeds are medians", header, runs, rows)


def _planned(runs: Sequence[Run]) -> list[Block]:
    """Beside each number of the plan what was measured, and what to know about it."""
    header = ["training", "tokens planned", "measured", "tokens/s planned", "measured"]
    header += ["time planned", "measured", "GiB planned", "measured"]
    tables = across("Plan against measured", header, runs, _planned_rows)
    if not tables:
        said = (
            "There is no plan to compare with: no configuration was given, or the trainings have other sizes."
        )
        return [Text(said)]
    if any(one["hours"] is None for run in runs if run.plan for one in run.plan["trainings"]):
        said = (
            "The plan has no time where neither the GPUs (cluster.gpu, gpus_per_node) nor a speed are known."
        )
        tables.append(Text(said))
    if any(not stage.on_gpus for run in runs for stage in run.stages):
        said = "On CPUs the plan counts the model, and the memory is that of the whole process."
        tables.append(Text(said))
    return tables


def _planned_rows(run: Run) -> list[list[str]]:
    """A row for each training that has the steps and the length of sequences of the plan."""
    found = []
    for one in run.plan["trainings"] if run.plan else []:
        stage = run.stage(one["name"])
        sizes = one["steps"], one["seq_length"]
        if not stage or (stage.steps, stage.settings.get("seq_length")) != sizes:
            continue
        planned = one["hours"]
        found.append(
            [
                stage.name,
                f"{one['tokens']:,}",
                f"{stage.tokens:,}",
                number(one["tokens_per_second_per_process"], 0),
                number(median_of(stage, "tokens_per_second_per_process"), 0),
                short_duration(3600 * planned) if planned else UNKNOWN,
                short_duration(stage.total("timing", "step_seconds")),
                number(one["memory"]["total"] / 2**30, 2),
                number(_peak(stage), 2),
            ]
        )
    return found


def _ended(stage: Stage, attempt: Attempt) -> tuple[str, int]:
    """How an attempt ended, and after which step; its metrics tell where it did not."""
    if attempt.outcome or attempt is not stage.attempts[-1]:
        return attempt.outcome or "no word", attempt.iteration
    return "running" if stage.state == "running" else "no word", stage.done


def _attempts(runs: Sequence[Run]) -> list[Block]:
    """The attempts of trainings that needed more than one, or that did not finish."""

    def rows(run: Run) -> list[list[str]]:
        return [
            [
                stage.name,
                attempt.started,
                attempt.job or UNKNOWN,
                outcome,
                attempt.error or "",
                f"{attempt.from_iteration:,}",
                f"{step:,}",
                UNKNOWN if attempt.seconds is None else short_duration(attempt.seconds),
            ]
            for stage in run.stages
            if len(stage.attempts) > 1 or stage.state != "finished"
            for attempt in stage.attempts
            for outcome, step in (_ended(stage, attempt),)
        ]

    header = ["training", "began", "Slurm job", "outcome", "error", "from step", "to step", "time"]
    return across("Attempts of trainings that did not finish in one", header, runs, rows, names=5)

"""What a dry-run prints at its end: what trainings will do, and for Slurm the requests, sizes and times."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from snaketron.config import Config, Training
from snaketron.graph.graph import Graph
from snaketron.graph.lines import group_title
from snaketron.graph.outlook import lines, trainings
from snaketron.sizes.layout import layout_words
from snaketron.sizes.plan import Estimate, estimate, hours_at
from snaketron.sizes.speed import ESTIMATED
from snaketron.wording import BYTES, large, plural, short_duration

Request = Callable[[Any], str]  # from a job to options of sbatch
Seconds = Callable[[Any], float]  # how long a job reads raw files, roughly


def explain(workflow: Any, graph: Graph, request: Request) -> None:
    """Print the plan at the end of a dry-run, when the graph is known; nothing after another run.

    `request` says what sbatch is asked for a job.
    """
    if workflow.dryrun and (dag := getattr(workflow, "dag", None)):
        if found := trainings(graph.config, dag):
            print("\n  ".join(("\nTrainings:", *lines(found))), file=sys.stderr)
        jobs = _submitted(workflow, dag, graph.config)
        if plan := describe(graph.config, jobs, request, graph.seconds):
            print(f"\n{plan}", file=sys.stderr)


def _submitted(workflow: Any, dag: Any, config: Config) -> list[Any]:
    """The jobs and groups of jobs that would be submitted, in the order of the rules and of the phases."""
    rules = [rule.name for rule in workflow.rules]
    phases = ["", *(phase.name for phase in config.pretrain.phases)]
    jobs = sorted(
        dag.needrun_jobs(exclude_finished=False),  # all of them count as finished by now
        key=lambda job: (rules.index(job.rule.name), phases.index(job.wildcards.get("phase", ""))),
    )
    groups = {job: dag.get_job_group(job) or job for job in jobs}
    sizes = Counter(groups.values())
    # Large groups first: Snakemake puts the jobs of a rule into groups in no order.
    jobs.sort(key=lambda job: (rules.index(job.rule.name), -sizes[groups[job]]))
    return list(dict.fromkeys(groups[job] for job in jobs))


def describe(config: Config, jobs: Iterable[Any], request: Request, seconds: Seconds) -> str | None:
    """The plan of the jobs, or groups of jobs, that would be submitted to Slurm; None where none would.

    Jobs of the same rules with the same request are one entry. Hours of trainings are told where the
    configuration states their throughput, and those of data where they are more than the time limit.
    """
    trainings = {(training.section, training.phase): training for training in config.trainings()}
    entries: dict[tuple[str, str], list[Any]] = {}
    for job in jobs:
        if job.resources.get("slurm_partition"):
            entries.setdefault((_title(job, trainings), request(job)), []).append(job)
    if not entries:
        return None
    lines, gpu_hours, cpu_hours = ["To be submitted to Slurm:"], 0.0, 0.0
    for (title, options), same in entries.items():
        lines += ["", f"  {title}" + (f"  x {len(same)}" if len(same) > 1 else ""), f"    sbatch {options}"]
        first = same[0]
        minutes = first.resources.get("runtime") or 0
        if training := trainings.get(_key(first)):
            needs = estimate(config, training)
            lines += [f"    {line}" for line in size_lines(config, training, needs)]
            lines.append(f"    {time_line(training, needs, minutes)}")
            if needs.process_hours and config.cluster.gpus_per_node:
                gpu_hours += needs.process_hours
        elif too_long := _too_long(same, minutes, seconds):
            lines.append(f"    {too_long}")
        if not training and not first.resources.get("run"):  # what trains and merges has it, on GPUs too
            cpus = first.resources.get("cpus_per_task") or first.threads
            cpu_hours += len(same) * minutes / 60 * cpus
    total = f"At most {cpu_hours:,.0f} CPU hours for data, by the time limits"
    if gpu_hours:
        total += f"; {gpu_hours:,.1f} GPU hours for trainings, by the stated or estimated throughput"
    return "\n".join([*lines, "", f"{total}."])


def _too_long(jobs: Iterable[Any], minutes: float, seconds: Seconds) -> str:
    """That the longest of some jobs, or groups of jobs, will not end within its time limit; else empty."""
    most = max(sum(map(seconds, job.jobs if job.is_group() else [job])) for job in jobs)
    if not minutes or most <= minutes * 60:
        return ""
    return (
        f"about {short_duration(most)} by the sizes of its files, more than the limit of "
        f"{short_duration(60 * minutes)}: raise `runtime` in the profile"
    )


def _key(job: Any) -> tuple[str, str]:
    return ("", "") if job.is_group() else (job.rule.name, job.wildcards.get("phase", ""))


def _title(job: Any, trainings: dict[tuple[str, str], Training]) -> str:
    if not job.is_group():
        training = trainings.get(_key(job))
        return training.name.replace("/", " ") if training else job.rule.name
    return group_title(member.rule.name for member in job.jobs)


def size_lines(config: Config, training: Training, needs: Estimate) -> list[str]:
    """The size of the model, its layout, and the memory of a process."""
    parallel = training.run.parallel
    layout = layout_words(parallel)
    on = plural(parallel.world_size, "GPU" if config.cluster.gpus_per_node else "CPU process")
    adapters, memory = needs.num_adapter_parameters, needs.memory
    each = "each" if parallel.pipeline_model_parallel_size == 1 else "the fullest"
    return [
        f"{large(needs.num_parameters)} parameters, {large(needs.num_active_parameters)} active a token"
        + (f", {large(adapters)} of adapters trained" if adapters else ""),
        f"{on}{f': {layout}' if layout else ''}",
        f"{large(memory.static, BYTES)} of weights, gradients and optimizer on {each}, "
        f"{large(memory.total, BYTES)} with activations{' and recordings' if memory.recordings else ''}",
    ]


def time_line(training: Training, needs: Estimate, limit_minutes: float) -> str:
    """The time of a training, and in how many jobs its time limit cuts it."""
    run, tokens = training.run, f"{large(needs.tokens)} tokens"
    if needs.hours is None:
        known = "name cluster.gpu and gpus_per_node, or state tokens_per_second_per_gpu"
        return f"{tokens}; {known}, for an estimate of the time"
    assert needs.speed is not None
    text = f"{tokens} at {needs.speed.tokens_per_second:,.0f} tokens/s on each"
    text += f" ({needs.speed.source})" if needs.speed.source == ESTIMATED else ""
    text += f": {short_duration(3600 * needs.hours)}"
    jobs = needs.num_jobs(limit_minutes / 60, run.stop_before_limit) or 1
    text += f", in {jobs:,} jobs of {short_duration(60 * limit_minutes)}" if jobs > 1 else ""
    if needs.speed.source == ESTIMATED and (others := hours_at(needs.published, training)):
        text += f"; {short_duration(3600 * others)} at the published speed of such GPUs"
    return text

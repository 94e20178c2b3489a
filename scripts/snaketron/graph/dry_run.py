"""What a dry-run says of Slurm: the requests, and what trainings need and how long they take."""

from __future__ import annotations

import math
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from snaketron.config import Config, Lora, Parallel, Pretrain, Tuning
from snaketron.sizes.memory import memory_of_process, static_of_run
from snaketron.sizes.parameters import adapter_parameters, num_active_parameters, num_parameters

BYTES = ("TB", "GB", "MB", "kB")
Request = Callable[[Any], str]  # from a job to options of sbatch


class Training(NamedTuple):
    """What a training is to do, and what it is known to need."""

    title: str
    run: Pretrain | Tuning
    tokens: int
    seq_length: int

    @property
    def hours(self) -> float | None:
        speed = self.run.tokens_per_second_per_gpu
        return self.tokens / (speed * self.run.parallel.world_size) / 3600 if speed else None


def trainings(config: Config) -> dict[tuple[str, str], Training]:
    """The trainings of a configuration, by rule and phase."""
    found = {
        ("pretrain", phase.name): Training(
            f"pretrain {phase.name}", config.pretrain, math.prod(steps), seq_length=steps[-1]
        )
        for phase in config.pretrain.phases
        for steps in [config.pretrain.steps(phase)]
    }
    length, tunings = config.sft_data.pack_size, {"sft": config.sft, "lora": config.lora}
    return found | {
        (name, ""): Training(name, run, run.train_iters * run.global_batch_size * length, length)
        for name, run in tunings.items()
    }


def explain(workflow: Any, config: Config) -> None:
    """Print the plan at the end of a dry-run, when the graph is known; nothing after another run."""
    if workflow.dryrun and (dag := getattr(workflow, "dag", None)):
        # The executor's own functions, so that what is shown is what would be sent.
        from snakemake_executor_plugin_slurm.submit_string import get_submit_command
        from snakemake_executor_plugin_slurm.utils import set_gres_string

        def request(job: Any) -> str:
            return sbatch_request(job, get_submit_command, set_gres_string)

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
        submitted = list(dict.fromkeys(groups[job] for job in jobs))
        if plan := describe(config, submitted, request):
            print(f"\n{plan}", file=sys.stderr)


def sbatch_request(job: Any, get_submit_command: Callable[..., str], set_gres_string: Request) -> str:
    """The options of sbatch for a job, as the executor plugin writes them, without names and command."""
    asked = job.resources
    call = get_submit_command(
        job,
        {
            "run_uuid": "-",
            "slurm_logfile": "-",
            "comment_str": "-",
            "account": f"-A {shlex.quote(str(asked.slurm_account))}" if asked.get("slurm_account") else "",
            "partition": f"-p {shlex.quote(str(asked.slurm_partition))}",
            "workdir": None,
        },
    )
    options = call.partition(" --comment - ")[2] + set_gres_string(job)
    return " ".join(options.split())


def describe(config: Config, jobs: Iterable[Any], request: Request) -> str | None:
    """The plan of the jobs, or groups of jobs, that would be submitted to Slurm; None where none would.

    Those of the same rules with the same request are one entry. GPU hours and times are those of trainings
    whose throughput the configuration states.
    """
    known = trainings(config)
    entries: dict[tuple[str, str], list[Any]] = {}
    for job in jobs:
        if job.resources.get("slurm_partition"):
            entries.setdefault((_title(job, known), request(job)), []).append(job)
    if not entries:
        return None
    lines, gpu_hours, cpu_hours = ["To be submitted to Slurm:"], 0.0, 0.0
    for (title, options), same in entries.items():
        lines += ["", f"  {title}" + (f"  x {len(same)}" if len(same) > 1 else ""), f"    sbatch {options}"]
        first = same[0]
        training, minutes = known.get(_key(first)), first.resources.get("runtime") or 0
        if training:
            lines += [f"    {line}" for line in _needs(config, training)]
            lines.append(f"    {_time(training, minutes)}")
            if training.hours and config.cluster.gpus_per_node:
                gpu_hours += training.hours * training.run.parallel.world_size
        elif not first.resources.get("run"):  # which is of trainings, and of what merges their adapters
            cpus = first.resources.get("cpus_per_task") or first.threads
            cpu_hours += len(same) * minutes / 60 * cpus
    total = f"At most {cpu_hours:,.0f} CPU hours for data, by the time limits"
    if gpu_hours:
        total += f"; {gpu_hours:,.1f} GPU hours for trainings, by the stated throughput"
    return "\n".join([*lines, "", f"{total}."])


def _key(job: Any) -> tuple[str, str]:
    return ("", "") if job.is_group() else (job.rule.name, job.wildcards.get("phase", ""))


def _title(job: Any, known: dict[tuple[str, str], Training]) -> str:
    if not job.is_group():
        return known[_key(job)].title if _key(job) in known else job.rule.name
    counts = Counter(member.rule.name for member in job.jobs)
    return "a group of " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _needs(config: Config, training: Training) -> list[str]:
    """The size of the model and of what a process keeps of it."""
    model, vocab_size = config.model, config.tokenizer.vocab_size
    run, parallel = training.run, training.run.parallel
    static = static_of_run(model, vocab_size, run, run.optimizer)
    largest = max(memory.total for memory in static)
    peak = memory_of_process(model, vocab_size, training.seq_length, run, run.optimizer)
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": parallel.data_parallel_size,
    }
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    on = _plural(parallel.world_size, "GPU" if config.cluster.gpus_per_node else "CPU process")
    trained = ""
    if isinstance(run, Lora):
        number = sum(stage.total for stage in adapter_parameters(model, Parallel(), run))
        trained = f", {_count(number)} of adapters trained"
    return [
        f"{_count(num_parameters(model, vocab_size).total)} parameters, "
        f"{_count(num_active_parameters(model, vocab_size))} active a token{trained}",
        f"{on}{f': {layout}' if layout else ''}",
        f"{_count(largest, BYTES)} of weights, gradients and optimizer on each, "
        f"{_count(peak, BYTES)} with activations",
    ]


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def _time(training: Training, limit_minutes: float) -> str:
    """Time of a training, and in how many jobs its time limit cuts it."""
    run, tokens = training.run, f"{_count(training.tokens)} tokens"
    if (hours := training.hours) is None:
        return f"{tokens}; state tokens_per_second_per_gpu for an estimate of the time"
    text = f"{tokens} at {run.tokens_per_second_per_gpu:,.0f} tokens/s on each: {_hours(hours)}"
    usable = limit_minutes / 60 - run.stop_before_limit / 3600
    if limit_minutes and usable > 0 and hours > usable:
        text += f", in {math.ceil(hours / usable):,} jobs of {_hours(limit_minutes / 60)}"
    return text


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _count(number: float, units: tuple[str, ...] = ("T", "B", "M", "k")) -> str:
    """A large number with a unit: 120.6 B, 1.8 M."""
    for factor, unit in zip((1e12, 1e9, 1e6, 1e3), units, strict=True):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number:.0f}"

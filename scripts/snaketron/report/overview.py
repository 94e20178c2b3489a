"""The first screen of a page: what was trained, how far it is, losses, cost, an answer before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from snaketron.report.answers import exact_answers, quotes
from snaketron.report.blocks import Block, Facts, Part, Table, Text, number
from snaketron.report.measured import across, cost
from snaketron.report.progress import sign
from snaketron.report.runs import Run, Stage
from snaketron.wording import large, plural, short_duration

TRAININGS = ("pretrain", "sft", "lora")  # the rules that train
LEFT = ", for which the configuration does not ask any more,"
UNFINISHED = ("failed", "running", "stopped", "partly")  # states of a rule that are told
_VERBS = {
    "failed": "failed",
    "running": "is running",
    "partly": "is not complete",
    "stopped": "has stopped",
    "waiting": "waits",
}


def summary_part(runs: Sequence[Run]) -> Part:
    blocks: list[Block] = [Facts(_facts(runs[0]))] if len(runs) == 1 else _beside(runs)
    for run in runs:
        named = f"{run.name}: " if len(runs) > 1 else ""
        blocks += [Text(named + said, attention=run.state != "running") for said in missing(run)]
    blocks += across(
        "Trainings",
        ["training", "state", "steps", "tokens", "validation loss before", "after", "test loss", "time"],
        runs,
        lambda run: (
            [_row(stage) for stage in run.stages]
            + [[name, sign("waiting"), *[""] * 6] for name in run.planned]
        ),
        names=2,
    )
    for run in runs:
        for stage in [stage for stage in run.stages if stage.answers()][:1]:
            said = quotes(stage, 0, f", {run.name}" if len(runs) > 1 else "")
            blocks.append(replace(said, title=f"An answer: {said.title.lower()}"))
    return Part("Summary", blocks)


def _facts(run: Run) -> list[tuple[str, str]]:
    trained = [stage for stage in run.stages if stage.history.lines]
    facts = [("State", sign(run.state))]
    if said := _model(run):
        facts.append(("Model", said))
    if trained:
        facts.append(
            (
                "Trained",
                f"{large(sum(s.tokens for s in trained))} tokens in {plural(len(trained), 'training')}",
            )
        )
        # SFT and LoRA begin with the same base, so neither stands for the other.
        ends = [stage for stage in trained if not stage.name.startswith("pretrain/")] or trained[-1:]
        validated = [(stage.name, stage.values("valid_loss")) for stage in ends]
        # The first one is of what the training began with.
        losses = [(name, values[-1][1]) for name, values in validated if len(values) > 1]
        if said := ", ".join(f"{number(loss)} ({name})" for name, loss in losses):
            facts.append(("Validation loss", said))
        answered = [(stage.name, said) for stage in ends if (said := exact_answers(stage))]
        if said := "; ".join(f"{exact} ({name})" for name, exact in answered):
            facts.append(("Exact answers", said))
        facts.append(("Time of the trainings", short_duration(sum(s.seconds for s in trained))))
        facts.append(("Cost of the trainings", cost(trained)))
        if warned := sum(len(stage.history.warnings) for stage in trained):
            facts.append(("Warnings while training", f"{warned} (under Curves)"))
    if seconds := sum(sum(rule.seconds) for name, rule in run.rules.items() if name not in TRAININGS):
        facts.append(("Time of all other jobs", short_duration(seconds)))
    return facts


def _model(run: Run) -> str:
    """The size of the model by the plan."""
    for one in run.plan["trainings"] if run.plan else []:
        return f"{large(one['parameters'])} parameters, {large(one['active_parameters'])} active"
    return ""


def _beside(runs: Sequence[Run]) -> list[Block]:
    """The facts of several runs, a row each."""
    facts = {run.name: dict(_facts(run)) for run in runs}
    header = list(dict.fromkeys(name for one in facts.values() for name in one))
    rows = [[name, *(one.get(key, "") for key in header)] for name, one in facts.items()]
    return [Table("The runs", ["run", *header], rows, names=len(header) + 1)]


def missing(run: Run) -> list[str]:
    """What is not there yet and why, and what is of another run, a sentence each."""
    said = [
        f"{stage.name}{'' if run.is_asked(stage) else LEFT} {_VERBS[stage.state]}: {stage.reason}."
        for stage in run.stages
        if stage.reason
    ]
    for of, record in run.made.items():
        for entry in record.inputs:
            name, _, key = entry.version.rpartition("-")
            if (shown := run.shown(name)) and shown != key:
                said.append(f"{of} stands on another {name} (version {key}) than is shown here ({shown}).")
    unfinished = [rule for rule in run.rules.values() if rule.state in UNFINISHED]
    for rule in unfinished:
        if rule.name in TRAININGS and any(stage.reason and run.is_asked(stage) for stage in run.stages):
            continue  # said above, by the training itself
        about = next(iter((rule.failed or rule.unfinished_in("stopped")).items()), None)
        because = f": {about[1] or 'without a word'} (logs/{about[0]})" if about else ""
        said.append(
            f"{rule.name} {_VERBS[rule.state]}, {rule.done} of {rule.expected} jobs are done{because}."
        )
    said += [
        f"{log.removesuffix('.log')}{LEFT} {_VERBS[rule.ended.get(log, 'failed')]}: "
        f"{about or 'without a word'} (logs/{log})."
        for rule in run.rules.values()
        if rule.name not in TRAININGS
        for log, about in rule.left.items()
    ]
    if run.planned:
        waiting = "what they are made from is not there yet"
        if not unfinished and not any(stage.reason for stage in run.stages):
            waiting = "nobody has asked for them since"
        said.append(f"Not begun: {', '.join(run.planned)}; {waiting}.")
    return said + run.trouble


def _row(stage: Stage) -> list[str]:
    before = stage.values("valid_loss")
    steps = f"{stage.done:,}" if stage.done == stage.steps else f"{stage.done:,} of {stage.steps:,}"
    return [
        stage.name,
        sign(stage.state),
        steps,
        f"{stage.tokens:,}",
        number(before[0][1] if before else None),
        number(before[-1][1] if len(before) > 1 else None),
        number(stage.last("test_loss")),
        short_duration(stage.seconds),
    ]

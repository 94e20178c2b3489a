"""Evaluations of several checkpoints beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.files import read_json
from snaketron.log import UserError
from snaketron.report.blocks import Part, Table, Text
from snaketron.report.tables import table

if TYPE_CHECKING:
    from snaketron.report.runs import Run

# What is shown of a part, in order: the key of the result, and its name in the table.
_SHOWN = {
    "text": {"loss": "loss", "bits_per_byte": "bits a byte"},
    "chats": {"loss": "loss of answers"},
}


def read_evaluations(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The results of `eval/<stage>.json` files, by stage; those of lm-eval's own files by its model.

    Several of one stage, of yesterday and of today, are told apart by their files: "sft (old/sft.json)".
    """
    found: dict[Path, dict[str, Any]] = {}
    for path in paths:
        if path in found:
            raise UserError(f"{path}: named twice")
        try:
            value = read_json(path)
            if "results" in value and "model_name" in value:
                value = _of_lm_eval(value)
            value["stage"]
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `snakemake eval/<stage>.json` makes one") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not an evaluation of this workflow ({error})") from None
        found[path] = value
    number = Counter(value["stage"] for value in found.values())
    return {
        stage if number[stage := value["stage"]] == 1 else f"{stage} ({path})": value
        for path, value in found.items()
    }


def _of_lm_eval(value: dict[str, Any]) -> dict[str, Any]:
    """What `lm_eval --output_path` wrote, as an evaluation."""
    tasks = {name: plain_numbers(metrics) for name, metrics in value["results"].items()}
    return {"stage": value["model_name"], "tasks": tasks}


def plain_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a task of lm-eval that are numbers, without the filter `none` in their names.

    Some of its metrics are numbers of NumPy, which JSON does not know.
    """
    return {
        name.removesuffix(",none"): value if isinstance(value, int) else float(value)
        for name, value in metrics.items()
        if isinstance(value, Real) and "_stderr" not in name and name != "sample_len"
    }


def rows(evaluation: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(what was asked, measure, value) of everything in an evaluation that one compares."""
    for part, shown in _SHOWN.items():
        for name, values in evaluation.get(part, {}).items():
            for key, measure in shown.items():
                if (value := values.get(key)) is not None:
                    yield name, measure, value
    for name, kinds in evaluation.get("answers", {}).items():
        for kind, values in kinds.items():
            yield name, f"exact {kind} (of {values['asked']})", values["share"]
            yield name, f"cut {kind} (of {values['asked']})", values["cut"] / values["asked"]
    for name, values in evaluation.get("tasks", {}).items():
        for measure, value in values.items():
            if measure != "questions" and value is not None:
                yield name, measure, value


def beside(evaluations: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table with a column for each evaluation; an empty field was not measured.

    Measures of answers that were cut have no row where none was.
    """
    values = {name: {(a, b): v for a, b, v in rows(one)} for name, one in evaluations.items()}
    measured = dict.fromkeys(key for of_one in values.values() for key in of_one)
    lines = [
        [data, measure, *(_value_text(v.get((data, measure)), measure) for v in values.values())]
        for data, measure in measured
        if not measure.startswith("cut ") or any(v.get((data, measure)) for v in values.values())
    ]
    return ["data", "measure", *values], lines


def markdown(evaluations: Mapping[str, dict[str, Any]]) -> str:
    """Evaluations beside each other as Markdown."""
    return table(*beside(evaluations), names=2)


def _value_text(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if measure.startswith(("exact ", "cut ")) else f"{value:.4f}"


def evaluations_part(runs: Sequence[Run]) -> Part:
    """Evaluations of all checkpoints beside each other; what was not measured is empty."""
    several = len(runs) > 1
    evaluations = {
        (f"{run.name}: {stage}" if several else stage): one
        for run in runs
        for stage, one in run.evaluations.items()
    }
    if not evaluations:
        said = "No checkpoint was evaluated. The target eval/sft.json evaluates the one of SFT."
        return Part("Evaluation", [Text(said)])
    table = Table("Evaluations on the test splits", *beside(evaluations), names=2)
    return Part("Evaluation", [*_of_others(runs), table])


def _of_others(runs: Sequence[Run]) -> list[Text]:
    """Evaluations of checkpoints that were trained again since, a sentence each."""
    said = []
    for run in runs:
        for name, one in run.evaluations.items():
            shown, of = run.shown(name), one.get("checkpoint", "").rpartition("-")[2]
            if shown and of and of != shown:
                named = f"{run.name}: " if len(runs) > 1 else ""
                other = f"is of another {name} (version {of}) than is shown here ({shown})."
                said.append(Text(f"{named}eval/{name}.json {other}", attention=True))
    return said

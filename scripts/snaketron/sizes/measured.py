"""Trainings whose speed and memory were measured, here or by others, as the estimates take them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.config import Model, Optimizer, Run
from snaketron.sizes.layout import SHORT_NAMES
from snaketron.sizes.work import Work

import yaml

HERE = "docs/measurements.md"
CARD = "Megatron Bridge's verification card"
TABLE = "Megatron Bridge's performance table"
VOCABULARY = 131072
SHORT = Optimizer(gradient_precision="bf16", moment_precision="bf16")


class Point(NamedTuple):
    """A measured training; what was not measured is None."""

    what: str
    gpu: str
    work: Work
    tokens_per_second: float | None  # of each GPU
    peak_gib: float | None  # in tensors, of the fullest GPU; where layers are recorded, reserved
    source: str


def points(super_model: Model, nano: Model) -> list[Point]:
    """All points of measured.yaml, with the models of config/super.yaml and config/nano.yaml."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    models = {"super": super_model, "nano": nano}
    for name, keys in table["models"].items():
        whole = models[keys.pop("of")] if "of" in keys else Model()
        models[name] = whole.model_copy(update=keys)
    return [_point(group["all"] | row, models) for group in table["groups"] for row in group["rows"]]


def _point(row: Mapping[str, Any], models: Mapping[str, Model]) -> Point:
    sizes = {key: row[name] for name, key in SHORT_NAMES.items() if name in row}
    run = {
        "micro_batch_size": row.get("micro_batch", 1),
        "parallel": sizes | {"pipeline_split": row.get("split", "layers")},
        "recompute": row.get("recompute", []),
        "offload_optimizer": row.get("offload_optimizer", 0.0),
    }
    work = Work(
        model=models[row["model"]].model_copy(update={"precision": row.get("precision", "bf16")}),
        vocab_size=VOCABULARY,
        seq_length=row["length"],
        global_batch_size=row["batch"],
        run=Run.model_validate(run),
        optimizer=SHORT if row.get("short") else Optimizer(),
        cuda_graphs=row.get("graphs", False),
        recorded=row.get("recorded", False),
        dispatcher=row.get("dispatcher", "alltoall"),
        keeps_scan=row.get("keeps_scan", False),
    )
    return Point(row["what"], row["gpu"], work, row.get("speed"), row.get("gib"), row["source"])

"""Trainings whose speed and memory were measured, here or by others, as the estimates take them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from snaketron.config import Model, Optimizer, Run, Section
from snaketron.config.base import Dispatcher, Precision
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


class Row(Section):
    """A training of measured.yaml, whose head explains the keys."""

    what: str
    gpu: str
    model: str
    length: int
    batch: int
    micro_batch: int = 1
    TP: int = 1
    PP: int = 1
    CP: int = 1
    EP: int = 1
    DP: int = 1
    split: Literal["layers", "time"] = "layers"
    recompute: tuple[str, ...] = ()
    offload_optimizer: float = 0.0
    precision: Precision = "bf16"
    short: bool = False
    graphs: bool = False
    recorded: bool = False
    dispatcher: Dispatcher = "alltoall"
    keeps_scan: bool = False
    speed: float | None = None
    gib: float | None = None
    source: str


def points(super_model: Model, nano: Model) -> list[Point]:
    """All points of measured.yaml, with the models of config/super.yaml and config/nano.yaml."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    models = {"super": super_model, "nano": nano}
    for name, keys in table["models"].items():
        whole = models[keys.pop("of")].model_dump() if "of" in keys else {}
        models[name] = Model.model_validate(whole | keys)
    rows = (group["all"] | row for group in table["groups"] for row in group["rows"])
    return [_point(Row.model_validate(row), models) for row in rows]


def _point(row: Row, models: Mapping[str, Model]) -> Point:
    sizes = {key: getattr(row, name) for name, key in SHORT_NAMES.items() if name in Row.model_fields}
    run = {
        "micro_batch_size": row.micro_batch,
        "parallel": sizes | {"pipeline_split": row.split},
        "recompute": row.recompute,
        "offload_optimizer": row.offload_optimizer,
    }
    work = Work(
        model=models[row.model].model_copy(update={"precision": row.precision}),
        vocab_size=VOCABULARY,
        seq_length=row.length,
        global_batch_size=row.batch,
        run=Run.model_validate(run),
        optimizer=SHORT if row.short else Optimizer(),
        cuda_graphs=row.graphs,
        recorded=row.recorded,
        dispatcher=row.dispatcher,
        keeps_scan=row.keeps_scan,
    )
    return Point(row.what, row.gpu, work, row.speed, row.gib, row.source)

"""The trainings of `eight_gpus`, by its parts."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snaketron.config.base import FLEXIBLE
from snaketron.sizes.gpus import GPUS
from snaketron.sizes.layout import SHORT_NAMES
from snaketron.sizes.plan import checkpoint_bytes

from tests.benchmarks import trainings
from tests.benchmarks.shapes import BF16_STATE, NANO, QUARTER
from tests.benchmarks.trainings import Training
from tests.unit.sizes.models import SMALL

PARITY = SMALL | {"mamba_num_heads": 16, "mamba_head_dim": 16, "mamba_num_groups": 8}  # fits TP 8 and EP 8
LAYOUTS = (
    *("TP 2", "EP 2, DP 2", "PP 2", "CP 2", "DP 2"),
    *("TP 4", "TP 2, EP 4, DP 2", "PP 2, EP 2, DP 2", "CP 2, TP 2"),
    *("TP 4, EP 8, DP 2", "EP 8, DP 8", "PP 2, EP 4, DP 4", "TP 2, CP 2, PP 2", "DP 8"),
)
CHAINS = (
    ("TP 2", "PP 2"),
    ("TP 2, EP 4, DP 2", "PP 2, EP 2, DP 2"),
    ("TP 4, EP 8, DP 2", "PP 2, EP 4, DP 4"),
)
TOLERANCE = {"fp32": (1e-3, 1e-2), "bf16": (1e-2, 3e-2)}  # as in tests/gpu
# Without the search for the fastest kernels, which takes a minute for each new shape.
UNTUNED = {"MAMBA_DETERMINISTIC": "1", "TRITON_CACHE_AUTOTUNING": "0"}
TEXT = ("text",)
CORPORA = (("random",), TEXT)
NANO_30B = NANO | {"num_moe_experts": 128}
# Published for H100s: tokens/s of the 30B Lightning with the routing of a text, TFLOP/s of Super on 64.
PUBLISHED = {"nano bf16 text": "7,110 tokens/s", "super text": "236.3 TFLOP/s"}
USABLE_GIB = GPUS["h200"].usable_gb * 1e9 / 2**30
WRITTEN_S = 60  # for a checkpoint, at a GB a second
# Small trainings that a GPU has at once: without compiled kernels their first step takes one and a half
# minutes, in which the GPU has hardly anything to do.
SMALL_SEATS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """A training of a part, and the longest that it may take."""

    part: int
    training: Training
    limit: float = 240
    like: str = ""  # the training whose losses it should have
    goes_on_from: int = 0  # steps of the training of its place
    published: str = ""


def sizes(words: str) -> dict[str, int]:
    """Parallel sizes of words such as "TP 4, EP 8, DP 2"."""
    pairs = (word.split() for word in words.split(", ") if word)
    return {SHORT_NAMES[name]: int(size) for name, size in pairs}


def small(name: str, layout: str, precision: str, **keys: Any) -> Training:
    """A training of part 1."""
    model = PARITY | {"precision": precision}
    run = {"cpus_per_task": 1, "cuda_graphs": False} if precision == "bf16" else {"cpus_per_task": 1}
    values = {"length": 128, "batch": 16, "steps": 6, "corpora": TEXT, "vocabulary": 1024} | keys
    return Training(name, model, sizes(layout), run=run, environment=UNTUNED, **values)


def parity(precision: str) -> Iterator[Row]:
    yield Row(1, small("one GPU", "", precision))
    for layout in LAYOUTS:
        yield Row(1, small(layout, layout, precision), like="one GPU")
    for first, then in CHAINS:
        place = f"{first} then {then}"
        yield Row(1, small(f"{place}, before", first, precision, steps=3, place=place), like="one GPU")
        yield Row(1, small(place, then, precision, place=place), like="one GPU", goes_on_from=3)


def large(name: str, model: dict[str, Any], parallel: str, micro_batches: int = 4, **keys: Any) -> Training:
    """A training of 8,192 tokens a sequence, that recomputes no more than its memory asks for."""
    groups = sizes(parallel)
    batch = micro_batches * groups.get("data_parallel_size", 1)
    # The learning rate of a warm-up's first steps: a higher one teaches new routers to give a few experts all
    # tokens.
    optimizer = BF16_STATE | {"learning_rate": 1e-6, "min_learning_rate": 1e-7}
    keys = {"optimizer": optimizer, "length": 8192, "steps": 40, "stop_after": 10} | keys
    made = Training(name, model, groups, batch=batch, **keys)
    for recompute in ([], ["scan"], ["moe"], ["layer"]):
        made = dataclasses.replace(made, run=keys.get("run", {}) | {"recompute": recompute})
        if trainings.estimates(made)["fullest_gib"] < USABLE_GIB:
            break
    return made


def nano(there: int) -> Iterator[Row]:
    for precision in ("bf16", "fp8_current"):
        for corpora in CORPORA:
            kind = f"nano {precision} {corpora[0]}"
            model = NANO_30B | {"precision": precision}
            made = large(kind, model, f"EP {there}, DP {there}", corpora=corpora)
            yield Row(2, made, 200, published=PUBLISHED.get(kind, ""))


def super_quarter(there: int) -> Iterator[Row]:
    half = max(1, there // 2)
    # Sequences of a process in a step: many for short bubbles, and with TP two at a time, so that an expert
    # has more than a few hundred rows.
    tp = f"TP 4, EP {there}, DP {max(1, there // 4)}"
    layouts = {f"PP 2, EP {half}, DP {half}": (16, 1), tp: (16, 2), f"EP {there}, DP {there}": (8, 1)}
    for layout, (some, at_once) in layouts.items():
        for corpora in CORPORA:
            name, keys = f"super {layout} {corpora[0]}", {"micro_batch_size": at_once, "corpora": corpora}
            made = large(name, QUARTER, layout, some, stop_after=8, **keys)
            yield Row(3, made, 240, published=PUBLISHED.get(f"super {corpora[0]}", ""))
    run, name = {"cuda_graphs": False}, f"super {tp} text, launched"
    yield Row(3, large(name, QUARTER, tp, 16, micro_batch_size=2, corpora=TEXT, run=run))


def variants(there: int) -> dict[int, dict[str, str]]:
    """Trainings of `gpu_training` by part, each with what is published of evenly loaded experts on H100s.

    That is tokens/s of the 30B Lightning, and of Nano in fp8, on 16; TFLOP/s of Super on 64. Sixteen experts
    of Nano a GPU are Nano whole on eight.
    """
    whole = "nano_30b_ep4_even" if there == 4 else f"nano_8k_ep{there}_even"
    return {
        2: {whole: "14,195 tokens/s", f"nano_8k_ep{there}_even_fp8_current": "14,719 tokens/s"},
        3: dict.fromkeys([f"super_22_{how}_{there}_even" for how in ("ep", "pp2", "tp4")], "248.6 TFLOP/s"),
        4: dict.fromkeys([f"nano_8k_ep{there}{kind}" for kind in ("", "_even", "_launched")], ""),
    }


def scaling(there: int) -> Iterator[Row]:
    """Equal work on each GPU: 16 experts of Nano and four sequences."""
    for count in (1, 2, 4, 8):
        more = NANO | {"num_moe_experts": 16 * count}
        yield Row(4, large(f"exchange: EP {count}", more, f"EP {count}, DP {count}", corpora=TEXT))
    yield Row(4, large(f"sums: DP {there}", NANO, f"DP {there}", corpora=TEXT))
    for micro_batches in (4, 16):
        name = f"bubbles: PP 2, {micro_batches} micro-batches"
        yield Row(4, large(name, NANO, "PP 2", micro_batches, corpora=TEXT))
    for dispatcher in ("alltoall", "allgather", "deepep", "hybridep") if there > 1 else ():
        name, run = f"exchange: EP {there}, {dispatcher}", {"moe_token_dispatcher": dispatcher}
        made = large(
            name, NANO | {"num_moe_experts": 16 * there}, f"EP {there}, DP {there}", corpora=TEXT, run=run
        )
        yield Row(4, made)


def saved(there: int, room: float) -> Row:
    """The largest part of Nano of which two checkpoints have room, and one is written in `WRITTEN_S`."""
    for layers in (52, 26, 13, 6, 3):
        model = NANO_30B | {"hybrid_layer_pattern": NANO["hybrid_layer_pattern"][:layers]}
        run = {"save_interval": 16, "keep_checkpoints": 1, "max_restarts": 1}
        layout = f"EP {there}, DP {there}"
        made = large(f"saved: {layers} layers of Nano", model, layout, 2, stop_after=0, corpora=TEXT, run=run)
        config = made.config(there)
        size = checkpoint_bytes(config, config.training("pretrain/one"))
        if size < min(room / 2.2, WRITTEN_S * 1e9):
            break
    return Row(5, made, 240)


def rows(parts: list[int], there: int, tiny: bool, root: Path) -> list[Row]:
    if tiny:
        run = {"save_interval": 4, "max_restarts": 1, "cpus_per_task": 1}
        made = dataclasses.replace(small("saved: tiny", "DP 2", "fp32", steps=40), run=run)
        found = [*parity("fp32"), Row(5, made)]
    else:
        room = shutil.disk_usage(root).free
        found = [*parity("bf16"), *nano(there), *super_quarter(there), *scaling(there), saved(there, room)]
    return [row for row in found if row.part in parts]


def missing(row: Row, there: int) -> str:
    """Why a training cannot run here; empty where it can."""
    training = row.training
    if training.gpus > there:
        return f"needs {training.gpus} GPUs, and there are {there}"
    if (needed := trainings.estimates(training)["fullest_gib"]) > USABLE_GIB:
        return f"needs {needed:.0f} GiB of a GPU, by the estimate"
    dispatcher = training.run.get("moe_token_dispatcher")
    if dispatcher in FLEXIBLE and not importlib.util.find_spec("deep_ep"):
        return f"{dispatcher}: the package deep_ep is not installed"
    return ""

"""The kernels of Mamba's scan and of the experts' rounding to fp8 on one GPU, and sizes of their programs.

    python -m tests.benchmarks.scan                              # beside what they replace
    python -m tests.benchmarks.scan --sizes [KERNEL ...] --seconds 120

Each is measured with the widths of Nemotron 3 Nano and Super and 8,192 positions, in bf16, beside the kernels
of causal-conv1d and mamba-ssm that it replaces (those of fp8 replace none). The table has the bytes that it
must read and write, the time of a copy of as many, and the largest difference from what it replaces (under
fp8 from plain PyTorch), relative to the norm.

The times of kernels are those of the GPU alone: calls are recorded in a CUDA graph and its replays are timed,
as a training records its micro-batches. Timed as they are called, most of mamba-ssm's functions and some of
these take as long as the host needs to start their kernels, which says nothing about the kernels.

`--sizes` tries other values of the constants at the beginning of the kernels' files. Processes compile them
first, in up to half of `--seconds`, the likeliest first. What is not compiled by then is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from snaketron import files
from snaketron.model.megatron import (
    experts8,
    scan_convolution,
    scan_groups,
    scan_kernels,
    scan_output,
    scan_states,
)

import torch
from tests.benchmarks.compiling import compiled
from tests.benchmarks.scan_cases import (
    DEVICE,
    GROUPS,
    LENGTH,
    MODELS,
    SHORT,
    Experts,
    Function,
    Kernel,
    Mamba,
    kernels,
)
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

MOST = 1e-2  # of a difference from the result with the present sizes


class Sizes(NamedTuple):
    """Constants of a module, the kernels that they shape, and values to try, the likeliest first."""

    module: ModuleType
    names: tuple[str, ...]
    kernels: tuple[str, ...]
    values: list[tuple[Any, ...]]

    def present(self) -> tuple[Any, ...]:
        return tuple(getattr(self.module, name) for name in self.names)

    def choose(self, values: tuple[Any, ...]) -> None:
        for name, value in zip(self.names, values, strict=True):
            setattr(self.module, name, value)

    def all(self) -> list[tuple[Any, ...]]:
        return [self.present(), *(v for v in self.values if v != self.present())]


def _tried(*axes: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """All combinations; the last axis changes first."""
    return [sum(parts, ()) for parts in itertools.product(*axes)]


def _ones(*values: int) -> list[tuple[int, ...]]:
    return [(value,) for value in values]


def _convolutions(*stretches: int) -> list[tuple[int, ...]]:
    tried = itertools.product(((256, 2), (128, 1), (512, 4), (256, 4)), (8, 4), stretches)
    return [(channels, stretch, rows, warps, 1) for (channels, warps), rows, stretch in tried]


ROUNDING = ("round_rows", "activate", "activate_back", "round_weights")
CONVOLUTION = ("CHANNELS", "STRETCH", "ROWS", "WARPS", "STAGES")
STATES = ("TILE", "WARPS", "STAGES", "READ")
# fmt: off
SIZES = {
    "states": Sizes(scan_states, STATES, ("states",), _tried(
        [((64, 64), 4), ((64, 32), 4), ((64, 128), 8), ((64, 64), 8)], _ones(3, 2, 4), _ones(128, 64))),
    "states_back": Sizes(scan_states, tuple(f"BACK_{name}" for name in STATES), ("states_back",), _tried(
        [((64, 64), 4), ((64, 32), 4), ((128, 64), 8), ((64, 64), 8)], _ones(3, 2, 4), _ones(128, 64))),
    "output": Sizes(scan_output, ("SIDE", "WARPS", "READ", "STAGES"), ("output",), _tried(
        [(64, 4, 32), (128, 8, 32), (64, 4, 64), (128, 8, 64), (128, 4, 32)], _ones(1, 2, 3))),
    "x_back": Sizes(scan_kernels, ("X_SIDE", "X_WARPS", "X_STAGES"), ("x_back",), _tried(
        [(64, 4), (128, 8), (64, 8), (32, 4)], _ones(1, 2, 3))),
    "scores_back": Sizes(scan_kernels, ("SIDE", "SCORES_WARPS", "SCORES_STAGES"), ("scores_back",), _tried(
        [(64, 4), (64, 8), (32, 4)], _ones(3, 2, 1, 4))),
    "group_back": Sizes(scan_groups, ("GROUP_SIDE", "GROUP_WARPS", "GROUP_STAGES"), GROUPS, _tried(
        [(64, 4), (128, 8), (64, 8), (32, 4)], _ones(3, 2, 1))),
    "convolve_back": Sizes(
        scan_convolution, tuple(f"BACK_{name}" for name in CONVOLUTION), ("convolve_back",),
        _convolutions(128, 64, 256)),
    "convolve": Sizes(scan_convolution, CONVOLUTION, ("convolve",), _convolutions(128, 64, 32)),
    "step_back": Sizes(scan_kernels, ("HEADS", "STEP_WARPS"), ("step_back",), _tried(
        _ones(8, 4, 16, 2), _ones(4, 2, 8))),
    "rounding": Sizes(experts8, ("PART", "WARPS"), ROUNDING, [
        (1024, 4), (512, 2), (2048, 8), (512, 4), (1024, 8), (1024, 2), (256, 2), (2048, 4)]),
    "transpose": Sizes(experts8, ("BLOCK_OUT", "BLOCK_IN"), ("round_weights",), [
        (128, 64), (64, 64), (64, 128), (128, 32), (256, 32), (32, 128), (128, 128), (256, 64), (64, 32)]),
}
# fmt: on


def time_of(function: Function, milliseconds: int = 10) -> float:
    """Microseconds of the GPU, of calls recorded in a CUDA graph."""
    found = do_bench_cudagraph(function, rep=milliseconds, return_mode="median") * 1e3
    torch.cuda.empty_cache()  # what the graph wrote
    return found


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=False)]
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max())


def size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def copied() -> float:
    """Bytes that a copy reads and writes in a microsecond."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    # Not from a CUDA graph, which copies at two thirds of that speed.
    return 2 * size([source]) / do_bench(lambda: target.copy_(source), return_mode="median") / 1e3


def compare(out: Path) -> None:
    speed = copied()
    print(f"a copy reads and writes {speed / 1e6:.2f} TB/s\n")
    print("| kernel | model | us | replaced us | times | MB | copy us | difference |\n|---|---|" + "--:|" * 6)
    rows: list[dict[str, Any]] = []
    for shape, model in MODELS.items():
        mamba, experts = Mamba(model, LENGTH), Experts(model, LENGTH)
        replaced = mamba.replaced()
        expected = replaced | experts.plain()
        for name, kernel in (mamba.kernels() | experts.kernels()).items():
            error = difference(kernel.result(), expected[name]())
            moved = size(kernel.reads) + size(kernel.ours())
            us, theirs = time_of(kernel.ours), time_of(replaced[name]) if name in replaced else None
            row = {"kernel": name, "model": shape, "us": us, "replaced_us": theirs, "bytes": moved}
            rows.append(row | {"copy_us": moved / speed, "difference": error})
            files.write_json(out / "scan.json", rows)
            beside = f"{theirs:.1f} | {theirs / us:.2f}" if theirs else " | "
            print(
                f"| {name} | {shape} | {us:.1f} | {beside} | {moved / 1e6:.0f} | "
                f"{moved / speed:.1f} | {error:.1e} |",
                flush=True,
            )


def tasks(names: Sequence[str]) -> list[tuple[str, tuple[Any, ...]]]:
    """What is compiled, in its order: the likeliest sizes of each kernel, then the next ones."""
    each = [[(name, values) for values in SIZES[name].all()] for name in names]
    return [task for turn in itertools.zip_longest(*each) for task in turn if task]


@contextlib.contextmanager
def chosen(sizes: Sizes, values: tuple[Any, ...]) -> Iterator[None]:
    before = sizes.present()
    sizes.choose(values)
    try:
        yield
    finally:
        sizes.choose(before)


@functools.cache
def short_kernels() -> dict[str, dict[str, Kernel]]:
    return kernels(SHORT)


def compile_one(task: tuple[str, tuple[Any, ...]]) -> None:
    """Compile the kernels of a size by calls on short rows."""
    name, values = task
    sizes = SIZES[name]
    with chosen(sizes, values):
        for shape, kernel in itertools.product(MODELS, sizes.kernels):
            short_kernels()[shape][kernel].ours()


def present_and(there: Sequence[tuple[str, tuple[Any, ...]]], name: str) -> list[tuple[Any, ...]]:
    """The sizes that were compiled in time, after the present ones."""
    return [v for v in SIZES[name].all() if v == SIZES[name].present() or (name, v) in there]


def try_sizes(names: Sequence[str], jobs: int, began: float, seconds: float, out: Path) -> None:
    there, results = compiled(tasks(names), compile_one, jobs, began + seconds / 2), {}
    cases = kernels(LENGTH)
    for number, name in enumerate(names):
        sizes, now = SIZES[name], time.monotonic()
        until = now + (began + seconds - now) / (len(names) - number)
        found = list(measure(sizes, present_and(there, name), cases, until))
        results[name] = [{"sizes": values, "us": us} for values, us in found]
        files.write_json(out / "scan_sizes.json", results)
        report(name, sizes, found)


def measure(
    sizes: Sizes, tried: Sequence[tuple[Any, ...]], known: dict[str, dict[str, Kernel]], until: float
) -> Iterator[tuple[tuple[Any, ...], dict[str, float]]]:
    """Sizes, the first ones first, with the microseconds of all their kernels at each model."""
    cases = [(shape, known[shape][kernel]) for shape in MODELS for kernel in sizes.kernels]
    expected = [kernel.result() for _, kernel in cases]
    for values in tried:
        if time.monotonic() > until:
            return
        us = dict.fromkeys(MODELS, 0.0)
        with chosen(sizes, values):
            for (shape, kernel), result in zip(cases, expected, strict=True):
                error = difference(kernel.result(), result)
                if not error < MOST:
                    print(f"{values} of {sizes.names} give another result: {error:.1e}", flush=True)
                    break
                us[shape] += time_of(kernel.ours, 4)
            else:
                yield values, us


def report(name: str, sizes: Sizes, found: Sequence[tuple[tuple[Any, ...], dict[str, float]]]) -> None:
    print(f"\n{name}: {len(found)} sizes of {', '.join(sizes.names)}")
    if not found:
        return
    first = found[0][1]
    for shape in MODELS:
        best = sorted(found, key=lambda one: one[1][shape])[:3]
        print(f"  {shape}, now {first[shape]:.1f} us:", *(f"{v} {us[shape]:.1f}" for v, us in best), sep="  ")
    values, us = min(found, key=lambda one: sum(one[1][shape] / first[shape] for shape in MODELS))
    print("  both:", *(f"{shape} {us[shape]:.1f} us" for shape in MODELS))
    print(f"{', '.join(sizes.names)} = {', '.join(map(str, values))}", flush=True)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", choices=SIZES, metavar="KERNEL", help=", ".join(SIZES))
    parser.add_argument("--seconds", type=float, default=120, help="for all sizes together")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that compile")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes that compile end too
    torch.manual_seed(0)
    if args.sizes is None:
        compare(args.out)
    else:
        try_sizes(args.sizes or list(SIZES), args.jobs, began, args.seconds, args.out)


if __name__ == "__main__":
    main()

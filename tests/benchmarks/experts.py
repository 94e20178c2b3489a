"""The gradients of routed experts' weights on one GPU, and sizes of the kernel that adds them to their sum.

    python -m tests.benchmarks.experts --seconds 58

Beside torch's grouped product and the addition of what it wrote, with the widths of Nemotron 3 Nano and Super
and the rows and experts that a GPU has in some layouts, evenly loaded and as a text loads them. Sums are in
bf16. The best sizes of all then write a new gradient, and add to one in fp32.

Processes compile the sizes first, in up to a third of `--seconds`, the likeliest first. What is not compiled
by then is not measured.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from snaketron import files
from snaketron.model.megatron import expert_gradients

import torch
from tests.benchmarks import shapes
from tests.benchmarks.compiling import compiled
from tests.benchmarks.scan import Sizes, chosen, copied, difference
from torch import Tensor
from triton.testing import do_bench

DEVICE, SEED = "cuda", 0
MOST = 1e-2  # of a difference from torch's product and sum, which round twice
NAMES = ("OUTPUTS", "INPUTS", "ROWS", "WARPS", "STAGES")
# None of them spills registers. A multiprocessor has room for two programs of four warps, or for three.
SIZES = Sizes(
    expert_gradients,
    NAMES,
    (),
    [
        (128, 256, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (256, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (128, 256, 32, 8, 6),
        (128, 128, 32, 4, 6),
    ],
)


class Layout(NamedTuple):
    """What a GPU has of a model's experts in a micro-batch."""

    model: dict[str, Any]
    rows: int
    experts: int


NANO, SUPER = 8192 * shapes.NANO["moe_router_topk"], 8192 * shapes.SUPER["moe_router_topk"]
LAYOUTS = {
    "Nano, EP 4": Layout(shapes.NANO, NANO, 32),
    "Super, TP 4, EP 4": Layout(shapes.SUPER, SUPER // 4, 128),
    "Nano, slice": Layout(shapes.NANO, NANO, 16),
    "Super, PP 2, EP 2": Layout(shapes.SUPER, SUPER, 256),
}


def time_of(function: Callable[[], object]) -> float:
    """Microseconds of a call, before which nothing is in the L2 cache."""
    return do_bench(function, warmup=2, rep=12, return_mode="median") * 1e3


def numbers(rows: int, experts: int, *, even: bool) -> list[int]:
    """Rows of each expert: of a text, one of 32 experts gets ten times the mean, and one of 16 none."""
    shares = torch.ones(experts)
    if not even:
        generator = torch.Generator().manual_seed(SEED)
        fullest, empty = max(1, experts // 32), max(1, experts // 16)
        shares = torch.randn(experts, generator=generator).mul(0.7).exp()
        order = torch.randperm(experts, generator=generator)
        shares[order[:empty]], full = 0, order[empty : empty + fullest]
        shares[full] = 0
        shares *= (experts - 10 * fullest) / shares.sum()
        shares[full] = 10
    counts = (shares / shares.sum() * rows).long()
    counts[counts.argmax()] += rows - counts.sum()
    return counts.tolist()


class Case:
    """A weight's gradient of a layout."""

    def __init__(self, layout: Layout, *, fc1: bool, even: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        wide = layout.model["moe_ffn_hidden_size"]
        narrow = layout.model["moe_latent_size"] or layout.model["hidden_size"]
        self.widths = (wide, narrow) if fc1 else (narrow, wide)
        self.factors = [
            torch.randn(layout.rows, width, device=DEVICE).bfloat16() / math.sqrt(layout.rows)
            for width in self.widths
        ]
        self.total = torch.randn(layout.experts, *self.widths, device=DEVICE, dtype=dtype)
        counts = numbers(layout.rows, layout.experts, even=even)
        self.ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
        self.flop = 2 * layout.rows * math.prod(self.widths)
        self.bytes = sum(t.numel() * t.element_size() for t in (*self.factors, self.total, self.total))

    def ours(self, *, new: bool = False) -> tuple[Tensor]:
        expert_gradients.accumulate(self.total, *self.factors, self.ends, new=new)
        return (self.total,)

    def product(self) -> Tensor:
        return torch._grouped_mm(self.factors[0].mT, self.factors[1], offs=self.ends)

    def replaced(self, *, new: bool = False) -> tuple[Tensor]:
        product = self.product()
        return (self.total.copy_(product) if new else self.total.add_(product),)

    def error(self) -> float:
        """How the product differs: that which is added to zeros."""
        self.total.zero_()
        found = self.ours()[0].clone()
        self.total.zero_()
        return difference([found], self.replaced())


def compile_one(values: tuple[Any, ...]) -> None:
    with chosen(SIZES, values):
        factors = [torch.zeros(64, 256, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
        total = torch.zeros(2, 256, 256, device=DEVICE, dtype=torch.bfloat16)
        ends = torch.full((2,), 64, device=DEVICE, dtype=torch.int32)
        expert_gradients.accumulate(total, *factors, ends, new=False)


def cases() -> Iterator[tuple[str, Layout, dict[str, bool]]]:
    for even in (True, False):
        for name, layout in LAYOUTS.items():
            for fc1 in (True, False):
                load = "even" if even else "as of a text"
                yield f"{name}, fc{1 if fc1 else 2}, {load}", layout, {"fc1": fc1, "even": even}


def measure(case: Case, there: list[tuple[Any, ...]], until: float) -> dict[tuple[Any, ...], float]:
    """Microseconds of each size, those of the time that there is."""
    us = {}
    for values in there:
        if time.monotonic() > until:
            break
        with chosen(SIZES, values):
            error = case.error()
            if error < MOST:
                us[values] = time_of(case.ours)
            else:
                print(f"{values} of {NAMES} give another result: {error:.1e}", flush=True)
    return us


def try_sizes(there: list[tuple[Any, ...]], until: float, out: Path) -> list[dict[str, Any]]:
    print(f"a copy reads and writes {copied() / 1e6:.2f} TB/s\n")
    columns = ("", "product", "and sum", "now", "best us", "times", "TFLOP/s", "TB/s", ", ".join(NAMES))
    print(f"| {' | '.join(columns)} |\n|---|{'--:|' * 7}---|")
    rows: list[dict[str, Any]] = []
    every = list(cases())
    for i, (name, layout, which) in enumerate(every):
        now = time.monotonic()
        if now > until:
            break
        case = Case(layout, **which)
        product, both = time_of(case.product), time_of(case.replaced)
        us = measure(case, there, now + (until - now) / (len(every) - i))
        rows.append({"case": name, "product_us": product, "sum_us": both, "sizes": list(us.items())})
        files.write_json(out / "experts.json", rows)
        if us:
            best = min(us, key=us.__getitem__)
            times = f"{us.get(SIZES.present(), math.nan):.0f} | {us[best]:.0f} | {both / us[best]:.2f}"
            rates = f"{case.flop / us[best] / 1e6:.0f} | {case.bytes / us[best] / 1e6:.2f}"
            print(f"| {name} | {product:.0f} | {both:.0f} | {times} | {rates} | {best} |", flush=True)
    return rows


def report(rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Print how many times as fast the sizes are that were measured in all cases; the best ones."""
    times = [{values: row["sum_us"] / us for values, us in row["sizes"]} for row in rows]
    known = [values for values in SIZES.all() if all(values in one for one in times)]
    if not times or not known:
        raise SystemExit("no sizes were measured in all cases")

    def mean(values: tuple[Any, ...]) -> float:
        return math.exp(sum(math.log(one[values]) for one in times) / len(times))

    print(f"\ntimes as fast as product and sum, in {len(times)} cases: mean, least, most")
    for values in sorted(known, key=mean, reverse=True):
        each = [one[values] for one in times]
        print(f"  {values}  {mean(values):.3f}  {min(each):.2f}  {max(each):.2f}")
    return max(known, key=mean)


def others(best: tuple[Any, ...], until: float) -> None:
    """The best sizes where they write a new gradient, and where they add to one in fp32."""
    print(f"\n{', '.join(NAMES)} = {best}, evenly loaded: us, and of product and copy or sum")
    for name, layout in LAYOUTS.items():
        for dtype, new in ((torch.bfloat16, True), (torch.float32, False)):
            if time.monotonic() > until:
                return
            case = Case(layout, fc1=True, even=True, dtype=dtype)
            with chosen(SIZES, best):
                error = case.error()
                found = time_of(lambda case=case, new=new: case.ours(new=new))
            before = time_of(lambda case=case, new=new: case.replaced(new=new))
            kind = "new, bf16" if new else "added, fp32"
            print(f"  {name}, {kind}: {found:.0f} {before:.0f}, difference {error:.1e}", flush=True)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=58, help="for all of it")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="that compile")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes that compile end too
    torch.manual_seed(SEED)
    there = compiled(SIZES.all(), compile_one, args.jobs, began + args.seconds / 3)
    rows = try_sizes(there, began + args.seconds * 0.9, args.out)
    others(report(rows), began + args.seconds)


if __name__ == "__main__":
    main()

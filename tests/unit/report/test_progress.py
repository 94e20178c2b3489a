"""The drawing of the rules: an arrow ends where it points, and passes all other boxes beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from snaketron.report import progress
from snaketron.report.workflow import RULES, Rule

import pytest

MAIN = (
    *("build_tokenizer", "install_chat_template", "tokenize_shard", "blend_pretrain", "index_pretrain"),
    *("render_chat", "pack_sft", "blend_sft", "pretrain", "sft"),
)
type Point = tuple[float, float]


def points(line: str) -> Iterator[Point]:
    """Points of a path of M, V, Q and C, 51 of each part."""
    at: Point = (0.0, 0.0)
    for kind, numbers in re.findall(r"([MVQC])([-\d. ]+)", line):
        found = [float(number) for number in numbers.split()]
        corners = [(at[0], found[0])] if kind == "V" else list(zip(found[::2], found[1::2], strict=True))
        if kind != "M":
            for t in (part / 50 for part in range(51)):
                across = [at, *corners]
                while len(across) > 1:  # de Casteljau
                    across = [
                        ((1 - t) * a + t * c, (1 - t) * b + t * d) for (a, b), (c, d) in pairwise(across)
                    ]
                yield across[0]
        at = corners[-1]


def drawn(*names: str) -> tuple[dict[str, Point], list[tuple[str, str, list[Point]]]]:
    """The upper left corner of each box, and the arrows with their ends."""
    rules = {name: Rule(name, 1, 1) for name in RULES if name in names}
    svg = progress._drawing(rules).svg
    found = re.findall(r'<rect x="(\d+)" y="(\d+)".*?<text[^>]*>([^<]*)<', svg)
    boxes = {name.replace(" ", "_"): (float(x), float(y)) for x, y, name in found}
    lines = re.findall(r'class="edge" d="([^"]+)"', svg)
    return boxes, [
        (*ends, list(points(line))) for ends, line in zip(progress._edges(rules), lines, strict=True)
    ]


@pytest.mark.parametrize(
    "more",
    [
        ("sample_corpus", "sample_chat"),
        ("lora", "evaluate"),
        ("lora", "merge_lora", "export_adapters", "export_hf", "merge_checkpoints", "evaluate"),
        ("download", "download_model", "sample_corpus", "sample_chat", "import_base", "register_packs"),
        tuple(RULES),
    ],
)
def test_no_arrow_goes_behind_a_box(more: tuple[str, ...]):
    """From sft to evaluate it went through lora, which read as if adapters came from sft."""
    boxes, arrows = drawn(*MAIN, *more)
    assert len(boxes) == len({*MAIN, *more}) and arrows
    for above, below, line in arrows:
        for name, (left, top) in boxes.items():
            hit = [(x, y) for x, y in line if 0.1 < x - left < 111.9 and 0.1 < y - top < 37.9]
            assert not hit, f"{above} to {below} behind {name}"
        (x, y), (left, top) = line[-1], boxes[below]
        assert (x, y) in ((left + 56, top), (left + 112, top + 19))  # its top or its right side

"""Show evaluations beside each other: eval/pretrain/focused.json eval/sft.json eval/lora_merged.json."""

from __future__ import annotations

import argparse
import json
import signal
from pathlib import Path

from snaketron.log import run
from snaketron.report.evaluations import markdown, read_evaluations, rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "evaluations",
        type=Path,
        nargs="+",
        help="eval/*.json of the rule evaluate, or results_*.json of lm-eval",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a list of {stage, data, measure, value} as JSON"
    )
    args = parser.parse_args(argv)
    found = read_evaluations(args.evaluations)
    if args.json:
        keys = ("data", "measure", "value")
        print(
            json.dumps(
                [{"stage": s} | dict(zip(keys, r, strict=True)) for s, e in found.items() for r in rows(e)]
            )
        )
    else:
        print(markdown(found))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    run(main)

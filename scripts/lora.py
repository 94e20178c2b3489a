"""Tune low-rank adapters of a pretrained checkpoint on packed conversations, and write the summary."""

from __future__ import annotations

from snaketron.inference.tuning import tune
from snaketron.log import run
from snaketron.settings.training import LoraSettings


def main(argv: list[str] | None = None) -> int:
    return tune(__doc__, argv, LoraSettings)


if __name__ == "__main__":
    run(main)

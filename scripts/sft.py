"""Tune a pretrained checkpoint on packed conversations, and write the summary of all stages."""

from __future__ import annotations

from snaketron.inference.tuning import tune
from snaketron.log import run
from snaketron.settings.training import TrainSettings


def main(argv: list[str] | None = None) -> int:
    return tune(__doc__, argv, TrainSettings)


if __name__ == "__main__":
    run(main)

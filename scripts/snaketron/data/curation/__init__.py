"""Curation of pretraining corpora with datatrove's blocks, each run for one output file at a time."""

from __future__ import annotations

import functools

from snaketron.log import logger


def quiet() -> None:
    """Log datatrove's warnings, and nothing else that it prints. Call this before its blocks run."""
    import loguru
    import tqdm

    tqdm.tqdm.__init__ = functools.partialmethod(tqdm.tqdm.__init__, disable=True)
    loguru.logger.remove()
    loguru.logger.add(
        lambda message: logger.warning("%s", message.strip()), level="WARNING", format="{message}"
    )

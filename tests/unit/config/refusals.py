"""Configurations that are refused."""

from __future__ import annotations

from snaketron.config import ConfigError, load

import pytest


def nested(path: str, value: object) -> dict:
    """`nested("sft.train_iters", 3)` is {"sft": {"train_iters": 3}}."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def merged(base: dict, values: dict) -> dict:
    """`values` over `base`, as Snakemake merges --configfile: sections key by key, lists as a whole."""
    both = {
        name: merged(base[name], value) if isinstance(value, dict) and name in base else value
        for name, value in values.items()
    }
    return base | both


def refusal(values: dict, **environment: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(values, environment)
    return str(error.value)

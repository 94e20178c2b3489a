"""The examples in docstrings say what the functions give."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import snaketron

import pytest

PACKAGE = Path(snaketron.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name: str):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed

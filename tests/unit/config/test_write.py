"""The files of config/: those that the classes generate, and overlays over them."""

from __future__ import annotations

import re
from pathlib import Path

from snaketron.config import Config, load, write

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]

# Files of one kind of GPU stand on super.yaml: test_overlays.
OVERLAYS = sorted(
    path
    for path in [*(REPOSITORY / "config").glob("*.yaml"), *(REPOSITORY / "tests/config").glob("*.yaml")]
    if path.stem not in ("h100", "h200", "b200", "gb200")
)


def test_nothing_given_is_the_defaults():
    config = load({}, {})
    assert config == Config()
    assert (config.seed, config.tracking, config.pathvars) == (
        1234,
        "off",
        {"data": "data", "ckpt": "ckpt", "hf": "hf", "eval": "eval"},
    )


def test_the_files_in_config_are_those_that_the_classes_generate():
    assert (REPOSITORY / "config/config.yaml").read_text() == write.as_yaml()
    assert (REPOSITORY / "config/schema.json").read_text() == write.as_schema()


def test_the_generated_yaml_is_the_defaults_again():
    assert load(yaml.safe_load(write.as_yaml()), {}) == Config()


def test_a_rule_that_a_description_names_exists():
    named = set(re.findall(r"-R (\w+)", write.as_yaml()))
    rules = "".join(path.read_text() for path in (REPOSITORY / "rules").glob("*.smk"))
    assert named == {"build_tokenizer"} and all(f"rule {name}:" in rules for name in named)


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.name)
def test_every_overlay_that_ships_is_valid(path):
    values = yaml.safe_load(path.read_text())
    config = load(values, {})
    assert values and all(hasattr(config, section) for section in values)

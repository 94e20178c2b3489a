"""A key that stands twice is an error with both lines, wherever the product or Snakemake reads YAML."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import ConfigError, load
from snaketron.config.doubled import check_doubled, doubled
from tests.conftest import REPOSITORY

import pytest

TWICE = """\
sft:
  train_iters: 7
seed: 1
sft:
  global_batch_size: 2
  optimizer: {learning_rate: 1, min_learning_rate: 0, learning_rate: 2}
chats:
  - {name: a, paths: [x]}
  - name: b
    paths: [y]
    name: c
"""


def refusal(*files: Path, **options) -> str:
    with pytest.raises(ConfigError) as error:
        check_doubled(files, **options)
    return str(error.value)


def test_each_doubled_key_is_named_with_both_lines(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(TWICE)
    assert refusal(path).splitlines() == [
        f"{path}: sft stands there twice, in lines 1 and 4; join them",
        f"{path}: sft.optimizer.learning_rate stands there twice, in lines 6 and 6; join them",
        f"{path}: chats[1].name stands there twice, in lines 9 and 11; join them",
    ]


def test_json_is_yaml_and_what_is_neither_is_left_to_its_reader(tmp_path: Path):
    assert doubled('{"a": 1,\n "a": 2}', "a.json") == [
        "a.json: a stands there twice, in lines 1 and 2; join them"
    ]
    assert (
        doubled("a: [", "a.yaml") == doubled("", "a.yaml") == doubled("a: {a: 1}\nb: {a: 1}", "a.yaml") == []
    )
    check_doubled([tmp_path / "none.yaml"])


def test_arguments_and_variables_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    assert refusal(arguments=["seed=1", "sft={train_iters: 1, train_iters: 2}", "seed=2"]).splitlines() == [
        "--config sft: train_iters stands there twice; join them",
        "--config: seed is given twice; join them",
    ]
    variable = {"SNAKETRON_SFT": "{train_iters: 1, train_iters: 2}"}
    with pytest.raises(ConfigError, match="variable SNAKETRON_SFT: train_iters stands there twice"):
        load({}, variable)


def test_a_profile_is_looked_at_however_it_is_named(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("jobs: 1\njobs: 2\n")
    for options in (["--profile", str(tmp_path)], [f"--workflow-profile={tmp_path}"]):
        problem = refusal(command=["snakemake", *options], environment={})
        assert problem.endswith("jobs stands there twice, in lines 1 and 2; join them")
    assert "jobs stands" in refusal(environment={"SNAKEMAKE_PROFILE": str(tmp_path)})


def test_our_own_files_have_no_doubled_keys():
    files = [*REPOSITORY.glob("config/*.yaml"), *REPOSITORY.glob("profiles/*/config.yaml")]
    assert len(files) >= 4
    check_doubled(files)

"""The files of --configfile: what a run was told with them, and which are no pair."""

from __future__ import annotations

import itertools
from pathlib import Path

from snaketron.config import load
from snaketron.graph.configfiles import configuration, keep, mixed, of_last_run
from snaketron.graph.snakemake.errors import tell_wrong_configfiles
from snaketron.log import UserError
from tests.conftest import REPOSITORY

import pytest
from snakemake.exceptions import WorkflowError
from snakemake.settings import types


def test_what_a_run_was_told_is_kept_with_what_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """--config and the environment are in no file, and the environment is another one later."""
    (tmp_path / ".snakemake").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run has kept it here"):
        of_last_run()
    told = load({"sft": {"train_iters": 7}}, {"SNAKETRON_SFT__WARMUP_ITERS": "3"})
    keep(told, [Path("/run/it(s).yaml"), "b.yaml"])
    monkeypatch.setenv("SNAKETRON_SFT__WARMUP_ITERS", "4")
    assert of_last_run() == (told, ["/run/it(s).yaml", "b.yaml"])
    assert (told.sft.train_iters, told.sft.warmup_iters) == (7, 3)


@pytest.mark.parametrize("names", [["super", "h100"], ["super", "gb200"], ["nano"]])
def test_a_recipe_is_kept_as_it_was(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    told = configuration([Path(f"config/{name}.yaml") for name in names])
    monkeypatch.setattr("snaketron.graph.configfiles._KEPT", tmp_path / "kept.json")
    keep(told, names)
    assert of_last_run() == (told, names)


def test_a_recipe_and_after_it_a_machine_are_a_pair_and_no_others_are(tmp_path: Path):
    recipes, machines = ["super", "nano"], ["b200", "h100"]
    own = tmp_path / "own.yaml"  # names no GPU, so it may stand anywhere
    own.write_text("seed: 3\n")
    for pair in itertools.permutations(recipes + machines, 2):
        first, second = (REPOSITORY / f"config/{name}.yaml" for name in pair)
        said = mixed([first, own, second])
        assert (said is None) == (pair[0] in recipes and pair[1] in machines)
        assert said is None or (f"in {first} and " in said and f"in {second} after it" in said)
    assert mixed([own]) is mixed([]) is None


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"# caf\xe9\nseed: 3\n")
    with pytest.raises(UserError, match=r"latin\.yaml: is not UTF-8 \(invalid .* at byte 5\)"):
        configuration([path])


def test_a_file_that_is_no_yaml_is_named_with_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    path = tmp_path / "open.yaml"
    path.write_text("seed: 3\nsft: {train_iters: 5\n")
    said = rf"^--configfile {path}: is no YAML: line 3: did not find expected ',' or '}}'$"
    with pytest.raises(UserError, match=said):
        configuration([path])
    monkeypatch.setattr(types, "load_configfile", types.load_configfile)  # put back at the end
    tell_wrong_configfiles()
    with pytest.raises(WorkflowError, match=said):
        types.load_configfile(path)


def test_elsewhere_the_directory_of_the_workflow_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml: no such file here; run this in the directory of the"):
        configuration([])

"""Names and values reach jobs on Slurm as they are, where the dry-run lets them pass."""

from __future__ import annotations

import shlex
from pathlib import Path

from snaketron.lineage.record import read
from tests.graph.test_names import HOSTILE, Workspace, named
from tests.slurm.conftest import Slurm, Submitting

import pyarrow.parquet as pq
import pytest

ROOT = "my; touch INJECTED & 'q' [1]* <x c::d -n "
REFUSED = set("$`\\")  # by graph/submission.py, as is what mixes quotes; tests/unit/graph/test_submission.py
ALLOWED = [name for name in HOSTILE if not REFUSED & set(name) and name.strip() == name and '"' not in name]
NAMES = sorted(ALLOWED, key=lambda name: name.startswith("-"))  # the tokenizer takes the first ones by name


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return named(
        *(tmp_path / "at work; & 'x' #1", NAMES),
        chats="my chats",
        root=ROOT,
        field="-$(touch INJECTED) 'text\"",  # from a file, so it is in no command of a submission
        config_name=f"{ROOT}config.yaml",
    )


def test_a_job_reads_the_files_that_are_called_so(
    slurm: Slurm, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert len(NAMES) > 15
    monkeypatch.setenv("OF_THE_USER", "$(touch INJECTED) ; touch INJECTED\n'\"")
    shard = "100_s"  # the first file by name is 100%s.jsonl
    result = slurm.run(workspace, f"{ROOT}data/tokens/docs/{shard}.json")
    assert result.status == 0, result.output[-5000:]
    tokens = workspace.path / f"{ROOT}data/tokens/docs"
    assert len(read(tokens / f"{shard}.json").inputs_named("text")) == len(NAMES)
    files = pq.read_table(tokens / f"{shard}.parquet", columns=["file"])["file"].to_pylist()
    assert sorted(Path(file).name for file in files) == sorted(NAMES)
    assert {job.state for job in slurm.jobs(workspace)} == {"COMPLETED"}
    assert not list(tmp_path.rglob("INJECTED"))


def test_the_command_of_a_training_has_its_paths_whole(workspace: Workspace):
    submitting = Submitting(workspace.path, workspace.overlays)
    result = submitting.snakemake("-n", "--printshellcmds", f"{ROOT}ckpt/pretrain/one")
    assert result.status == 0, result.output[-5000:]
    (line,) = (line for line in result.output.splitlines() if "python scripts/pretrain.py" in line)
    words = shlex.split(line)
    given = {option: words[words.index(option) + 1] for option in ("--blend", "--output")}
    assert given == {
        "--blend": f"{ROOT}data/pretrain/one/blend.json",
        "--output": f"{ROOT}ckpt/pretrain/one",
    }

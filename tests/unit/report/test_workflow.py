"""How far each rule is, by the logs and benchmarks of its jobs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from snaketron.lineage.record import Entry, Kind, Record
from snaketron.report.workflow import RULES, Rule, rules
from tests.conftest import REPOSITORY

import pytest


def read(
    root: Path,
    records: tuple[Record, ...] = (),
    *,
    running: bool = False,
    asked: Callable[[str], bool] = lambda log: True,
    **jobs: int,
) -> dict[str, Rule]:
    return rules(root, root / "logs", root / "benchmarks", jobs, records, running=running, asked=asked)


def test_every_rule_but_those_of_reports_is_drawn():
    files = (REPOSITORY / "rules").glob("*.smk")
    named = re.compile(r"^(?:rule|use rule \w+ as) (\w+)", re.MULTILINE)
    names = {name for file in files for name in named.findall(file.read_text())}
    assert set(RULES) == names - {"report", "data_report"}


def test_a_rule_is_finished_when_all_its_jobs_are(job, tmp_path: Path):
    job("tokenize_shard/docs/a", seconds=2.5)
    job("tokenize_shard/docs/b", seconds=4.0)
    job("sft", seconds=60)
    found = read(tmp_path, tokenize_shard=2, pretrain=1)
    assert {name: rule.state for name, rule in found.items()} == {
        "tokenize_shard": "finished",
        "pretrain": "waiting",
        "sft": "finished",
    }
    assert (found["tokenize_shard"].seconds, found["tokenize_shard"].peak_mb) == ([2.5, 4.0], 120.5)


def test_a_job_without_a_benchmark_has_failed_or_is_running(job, tmp_path: Path):
    """Where a Snakemake is at work, those fail whose log says so."""
    job("tokenize_shard/docs/a", seconds=2.5)
    job("tokenize_shard/docs/b", said="1 shard read\nerror: raw/b.jsonl, line 3: not JSON")
    job("render_chat/tools/a", said="12 rows so far")
    idle, busy = read(tmp_path), read(tmp_path, running=True)
    assert idle["tokenize_shard"].failed == {
        "tokenize_shard/docs/b.log": "error: raw/b.jsonl, line 3: not JSON"
    }
    assert (idle["tokenize_shard"].done, idle["tokenize_shard"].expected) == (1, 2)
    assert idle["render_chat"].failed == {"render_chat/tools/a.log": "12 rows so far"}
    assert (busy["tokenize_shard"].state, busy["render_chat"].state) == ("failed", "running")


def test_a_job_that_was_begun_again_is_not_done(job, tmp_path: Path):
    job("sft", seconds=60)
    os.utime(tmp_path / "benchmarks/sft.tsv", (1e9, 1e9))
    assert read(tmp_path, running=True)["sft"].state == "running"


def test_a_job_whose_command_was_run_by_hand_is_done_where_its_product_is_there(job, tmp_path: Path):
    """Nothing measures a run by hand, and a copy may lose the times: both logs are newer than benchmarks."""
    shard, b = "--record data/tokens/docs/a.json", "tokenize_shard/docs/b"
    job(
        "tokenize_shard/docs/a",
        seconds=2.5,
        options=shard,
        said="2026-11-29 10:00:00,1 raw/error.txt: 9 tokens",
    )
    job(b, options="--record data/tokens/docs/b.json", said="2026-11-29 10:00:00,1 b.txt: 9 tokens")
    job("sft", seconds=60, options="--output ckpt/sft", said="sft: ckpt/sft is ckpt/versions/sft-1")
    for name in ("tokenize_shard/docs/a", "sft"):
        os.utime(tmp_path / f"benchmarks/{name}.tsv", (1e9, 1e9))
    assert {name: rule.done for name, rule in read(tmp_path).items()} == {"tokenize_shard": 0, "sft": 0}
    for path in ("data/tokens/docs/a.json", "data/tokens/docs/b.json", "ckpt/sft"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = read(tmp_path)
    assert [(rule.state, rule.done) for rule in found.values()] == [("finished", 2), ("finished", 1)]
    # The next commands by hand fail, while what was made before is still there.
    job(b, options="--record data/tokens/docs/b.json", said="2026-11-29 11:00:00,1 error: b.txt: not UTF-8")
    job("sft", options="--output ckpt/sft", said="sft: starts (1 process on 1 node)")
    found = read(tmp_path)
    assert found["tokenize_shard"].failed == {f"{b}.log": "error: b.txt: not UTF-8"}
    assert (found["tokenize_shard"].done, found["sft"].done, found["sft"].state) == (1, 0, "failed")


def test_a_job_that_waits_to_be_run_again_neither_runs_nor_has_failed(job, tmp_path: Path):
    """Both logs are of the run before. This run has submitted the jobs again, and Slurm starts one by one."""
    job("tokenize_shard/docs/a", said="12 rows so far")
    job("tokenize_shard/docs/b", said="error: the disk is full")
    a, b = (tmp_path / f"logs/tokenize_shard/docs/{name}.log" for name in "ab")
    os.utime(a, (1e9, 1e9))
    os.utime(b, (1e9, 1e9))

    def state() -> str:
        begun = {a: 1e9 + 60, b: 1e9 + 60}
        jobs = {"tokenize_shard": 2}
        found = rules(tmp_path, a.parents[2], tmp_path, jobs, (), running=True, begun=begun)
        return found["tokenize_shard"].state

    assert state() == "waiting"
    os.utime(a, (1e9 + 120, 1e9 + 120))
    assert state() == "running"
    os.utime(b, (1e9 + 120, 1e9 + 120))
    assert state() == "failed"


@pytest.mark.parametrize("running", [False, True])
def test_a_job_that_the_configuration_has_no_more_neither_fails_nor_counts(job, tmp_path: Path, running):
    """A bad file was taken out of a corpus, and a corpus was called otherwise."""
    job("tokenize_shard/docs/a", seconds=2.5)
    job("tokenize_shard/docs/bad", said="error: raw/bad.jsonl, line 3: not JSON")
    job("tokenize_shard/notes/a", seconds=2.5)
    job("render_chat/tools/a", said="error: not JSON")
    jobs = {"tokenize_shard": 1}

    def asked(log: str) -> bool:
        return log == "tokenize_shard/docs/a.log"

    found = read(tmp_path, running=running, asked=asked, **jobs)
    assert found.keys() == {"tokenize_shard"}
    rule = found["tokenize_shard"]
    assert (rule.state, rule.done, rule.expected) == ("finished", 1, 1)
    assert rule.left == {"tokenize_shard/docs/bad.log": "error: raw/bad.jsonl, line 3: not JSON"}


def test_records_tell_what_is_done_where_the_logs_were_removed(tmp_path: Path):
    record = Record("tokens", "docs/a", "", 2.5, (), (), {}, {}, {})
    found = read(tmp_path, (record,), tokenize_shard=2)
    assert (found["tokenize_shard"].state, found["tokenize_shard"].seconds) == ("partly", [2.5])


@pytest.mark.parametrize(
    ("kind", "name", "path", "rule"),
    [
        ("sample", "docs", "data/sample/docs/part_0.jsonl", "sample_corpus"),
        ("sample", "tools", "data/sample/tools/part_0.jsonl", "sample_chat"),
        ("raw", "raw-web", "/hub/data/raw/web/a.jsonl.gz", "download"),
        ("raw", "raw-tokenizer", "data/hub/nvidia/nano/tokenizer.json", "download_model"),
        ("raw", "raw-mmlu", "data/hub/datasets/cais/mmlu@1a2b/all/test.parquet", "download_task_data"),
        ("raw", "raw-a", "data/hub/datasets/me/a@1a2b/test.parquet", "download_task_data"),
    ],
)
def test_the_record_of_a_file_says_which_rule_wrote_it(
    kind: Kind, name: str, path: str, rule: str, tmp_path: Path
):
    """A run with logs of its own beside the data of another one waited for these rules for ever."""
    record = Record(kind, name, "", 2.5, (), (Entry("a", path, "00", 1),), {}, {}, {})
    assert {name: found.state for name, found in read(tmp_path, (record,), **{rule: 1}).items()} == {
        rule: "finished"
    }


def test_the_record_of_a_checkpoint_says_which_rule_made_it(tmp_path: Path):
    """Merged adapters were taken for nobody's, so their rule waited for ever."""
    names = ("base/nano_1a2b3c", "pretrain/broad", "merged/broad", "sft", "lora", "lora_merged")
    records = tuple(Record("checkpoint", name, "", 2.5, (), (), {}, {}, {}) for name in names)
    found = read(tmp_path, records, merge_lora=1)
    rules = {"import_base", "pretrain", "merge_checkpoints", "sft", "lora", "merge_lora"}
    assert {name for name, rule in found.items() if rule.state == "finished"} == found.keys() == rules

"""How far each rule is, by the logs and benchmarks of its jobs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from snaketron.lineage.record import Record
from snaketron.report.workflow import RULES, Rule, rules
from tests.conftest import REPOSITORY


def read(
    root: Path, records: tuple[Record, ...] = (), *, running: bool = False, **jobs: int
) -> dict[str, Rule]:
    return rules(root / "logs", root / "benchmarks", jobs, records, running=running)


def test_every_rule_but_those_of_reports_is_drawn():
    files = (REPOSITORY / "rules").glob("*.smk")
    names = {name for file in files for name in re.findall(r"^rule (\w+):", file.read_text(), re.MULTILINE)}
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


def test_records_tell_what_is_done_where_the_logs_were_removed(tmp_path: Path):
    record = Record("tokens", "docs/a", "", 2.5, (), (), {}, {}, {})
    found = read(tmp_path, (record,), tokenize_shard=2)
    assert (found["tokenize_shard"].state, found["tokenize_shard"].seconds) == ("partly", [2.5])

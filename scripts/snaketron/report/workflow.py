"""The rules of the workflow as a person looks at them: what comes from what, and how far each is.

What is done, and when, is read from `logs/` and `benchmarks/`, which every rule writes: a log begins with its
job, and Snakemake writes a benchmark after it. A log that no benchmark follows begins with a command, which
says what the job makes. Whether that is there tells how the job ended, where the command was run by hand or a
copy of the directory lost the times of its files. Where logs and benchmarks were removed, lineage records
tell what is done.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from snaketron.config.data import sample_chats
from snaketron.lineage.record import Kind, Record

# Each rule with what it is made from, what its records are called, and the lane that it is drawn in: text to
# the left, conversations to the right. A test compares them with Snakemake's own graph.
RULES: dict[str, tuple[int, tuple[str, ...], Kind | Literal[""]]] = {
    "sample_corpus": (0, (), "sample"),
    "sample_chat": (2, (), "sample"),
    "download": (0, (), "raw"),
    "download_model": (2, (), "raw"),
    "download_task_data": (2, (), "raw"),
    "build_tokenizer": (1, ("sample_corpus", "download", "download_model"), "tokenizer"),
    "install_chat_template": (2, ("download_model",), "chat_template"),
    "filter_shard": (0, ("sample_corpus", "download", "build_tokenizer"), "filtered"),
    "exact_signature": (0, ("filter_shard",), "exact_signature"),
    "exact_find": (0, ("exact_signature",), "exact_duplicates"),
    "minhash_signature": (1, ("filter_shard",), "minhash_signature"),
    "minhash_buckets": (0, ("minhash_signature", "exact_find"), "minhash_pairs"),
    "minhash_cluster": (0, ("minhash_buckets",), "near_duplicates"),
    "decontamination_index": (1, (), "decontamination_index"),
    "curate_shard": (
        0,
        ("filter_shard", "exact_find", "minhash_cluster", "decontamination_index"),
        "curated",
    ),
    "tokenize_shard": (0, ("sample_corpus", "download", "build_tokenizer", "curate_shard"), "tokens"),
    "register_tokens": (0, ("build_tokenizer",), "registered_tokens"),
    "blend_pretrain": (0, ("tokenize_shard", "register_tokens"), "blend"),
    "index_pretrain": (0, ("blend_pretrain",), "index"),
    "render_chat": (
        2,
        ("sample_chat", "download", "build_tokenizer", "install_chat_template"),
        "render_chat",
    ),
    "pack_sft": (2, ("render_chat",), "pack_sft"),
    "register_packs": (2, ("build_tokenizer",), "registered_packs"),
    "blend_sft": (2, ("pack_sft", "register_packs"), "blend_sft"),
    "import_base": (1, ("download_model", "build_tokenizer"), ""),
    "register_checkpoint": (1, ("download_model", "build_tokenizer"), ""),
    "pretrain": (1, ("index_pretrain", "import_base", "register_checkpoint"), "checkpoint"),
    "merge_checkpoints": (0, ("pretrain",), ""),
    "sft": (1, ("pretrain", "import_base", "register_checkpoint", "blend_sft"), "checkpoint"),
    "lora": (1, ("pretrain", "import_base", "register_checkpoint", "blend_sft"), "checkpoint"),
    "export_adapters": (0, ("lora",), ""),
    "merge_lora": (1, ("lora",), "checkpoint"),
    "evaluate": (2, ("pretrain", "import_base", "sft", "lora", "blend_sft", "download_task_data"), ""),
    "export_hf": (0, ("pretrain", "import_base", "sft", "merge_lora"), ""),
}


# The options that say what a job makes. Snakemake removes that before the job runs, but not where the rule
# marks it with `update()`: there the last line of the log must name it.
MADE = ("--record", "--output")
TIME = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ ")  # before each line of a log
ERROR = re.compile(r"(\S+ \S+ )?error: ")  # the last line of a program that failed
_SAMPLE_CHATS = {source.name for source in sample_chats()}
SLACK_S = 5.0  # between the clocks of two machines that share a file system


@dataclass
class Rule:
    """How far a rule is."""

    name: str
    expected: int = 0  # jobs
    done: int = 0
    seconds: list[float] = field(default_factory=list)  # of each job that is done
    peak_mb: float = 0.0
    unfinished: dict[str, str] = field(default_factory=dict)  # what each log says last, by its name
    left: dict[str, str] = field(default_factory=dict)  # the same of jobs that nobody asks for any more
    waiting: int = 0  # jobs that an earlier run has left a log of, and that have not started yet in this one
    running: bool = False
    ended: dict[str, str] = field(default_factory=dict)  # states of those that a run knows, by their logs

    def state_of(self, log: str) -> str:
        """The state of an unfinished job: one that no run knows has failed, where it says so or none runs."""
        failed = not self.running or _is_error(self.unfinished[log])
        return self.ended.get(log, "failed" if failed else "running")

    def unfinished_in(self, state: str) -> dict[str, str]:
        """What the logs of unfinished jobs in a state say last."""
        return {log: said for log, said in self.unfinished.items() if self.state_of(log) == state}

    @property
    def failed(self) -> dict[str, str]:
        return self.unfinished_in("failed")

    @property
    def state(self) -> str:
        for state in ("failed", "running", "stopped", "waiting"):
            if self.unfinished_in(state):
                return state
        if self.done and self.done >= self.expected:
            return "finished"
        return "partly" if self.done else "waiting"


def rules(
    directory: Path,
    logs: Path,
    benchmarks: Path,
    jobs: Mapping[str, int],
    records: Iterable[Record],
    *,
    running: bool,
    begun: Mapping[Path, float] | None = None,
    ended: Mapping[Path, str] | None = None,
    asked: Callable[[str], bool] = lambda log: True,
) -> dict[str, Rule]:
    """The rules that a run has or will have, in the order of the workflow.

    Args:
        directory: where its commands run.
        jobs: how many jobs of each rule the configuration asks for; empty where it is not known.
        records: the lineage records that were found.
        running: whether a Snakemake is working in the directory.
        begun: when it began the jobs that have not ended (seconds since 1970), by their logs. One whose log
            is older has not started: it waits, in Slurm's queue say.
        ended: how jobs ended that did not finish, as far as runs have told, by their logs.
        asked: whether the configuration has the job of a log, named from `logs`.
    """
    found: dict[str, Rule] = {}
    made, known = _by_rule(records), ended or {}
    for name in RULES:
        rule = Rule(name, jobs.get(name, 0), running=running)
        _read_benchmarks(rule, benchmarks, asked)
        _read_logs(rule, directory, logs, benchmarks, begun or {})
        rule.ended = {log: known[logs / log] for log in rule.unfinished if logs / log in known}
        rule.left = {
            log: said
            for log, said in rule.unfinished.items()
            if not asked(log) and rule.state_of(log) != "running"
        }
        rule.unfinished = {log: said for log, said in rule.unfinished.items() if log not in rule.left}
        if not rule.done and not rule.unfinished:
            rule.done, rule.seconds = len(made[name]), made[name]
        rule.expected = max(rule.expected, rule.done + len(rule.unfinished) + rule.waiting)
        if rule.expected:
            found[name] = rule
    return found


def files_of(rule: str, root: Path, suffix: str) -> list[Path]:
    """The files of a rule: one, or one for each of its jobs below a directory of its name."""
    alone = root / f"{rule}{suffix}"
    return [*([alone] if alone.is_file() else []), *sorted((root / rule).rglob(f"*{suffix}"))]


def _read_benchmarks(rule: Rule, root: Path, asked: Callable[[str], bool]) -> None:
    for path in files_of(rule.name, root, ".tsv"):
        if measured := read_benchmark(path):
            rule.seconds.append(measured[0])
            rule.peak_mb = max(rule.peak_mb, measured[1])
            rule.done += asked(str(path.relative_to(root).with_suffix(".log")))


def read_benchmark(path: Path) -> tuple[float, float] | None:
    """The seconds and the peak memory (MB) of a job; None for a file that is cut off, or of other columns."""
    try:
        header, values = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[:2])
        measured = dict(zip(header, values, strict=True))
        memory = measured.get("max_rss", "")  # not a number where the job was too short
        return float(measured["s"]), float(memory) if re.fullmatch(r"[\d.]+", memory) else 0.0
    except (OSError, ValueError, KeyError):
        return None


def _read_logs(
    rule: Rule, directory: Path, logs: Path, benchmarks: Path, begun: Mapping[Path, float]
) -> None:
    """Find the jobs that have a log, no benchmark that came after it, and did not make what they make."""
    for path in files_of(rule.name, logs, ".log"):
        benchmark = benchmarks / path.relative_to(logs).with_suffix(".tsv")
        old, written = benchmark.exists(), path.stat().st_mtime
        if written < begun.get(path, 0.0) - SLACK_S:
            rule.waiting += 1
            rule.done = max(0, rule.done - old)
            continue
        if old and benchmark.stat().st_mtime >= written - SLACK_S:
            continue
        lines = [
            line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        if lines and _was_made(lines[0], lines[-1], directory):
            rule.done += not old
            continue
        rule.done = max(0, rule.done - old)  # the job was begun again
        said = next((line for line in reversed(lines) if _is_error(line)), lines[-1] if lines else "")
        rule.unfinished[str(path.relative_to(logs))] = "" if said.startswith("$ ") else TIME.sub("", said)


def _was_made(command: str, last: str, directory: Path) -> bool:
    """Whether what a command names as its product is there, by the last line of its log not from before."""
    try:
        words = shlex.split(command)
    except ValueError:  # cut off
        return False
    for option in MADE:
        if option in words[:-1]:
            path = words[words.index(option) + 1]
            said = not ERROR.match(last) if option == "--record" else path in last and last != command
            return said and (directory / path).exists()
    return False


def _is_error(line: str) -> bool:
    return bool(re.search(r"\berror\b|Error:|Traceback|Killed", line))


def rules_of(kind: str) -> list[str]:
    """The rules that write records of a kind."""
    return [name for name, (_, _, of_rule) in RULES.items() if of_rule == kind]


def rule_of(checkpoint: str) -> str:
    """The rule that makes a checkpoint, by its name below <ckpt>.

    >>> rule_of("pretrain/broad"), rule_of("lora_merged"), rule_of("merged/broad")
    ('pretrain', 'merge_lora', 'merge_checkpoints')
    """
    first = checkpoint.partition("/")[0]
    others = {"lora_merged": "merge_lora", "merged": "merge_checkpoints", "base": "import_base"}
    return others.get(first, first)


def _by_rule(records: Iterable[Record]) -> dict[str, list[float]]:
    """The seconds of the records of each rule, as far as a record tells which rule wrote it."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if rule := _writer(record):
            seconds[rule].append(record.seconds)
    return seconds


def _writer(record: Record) -> str | None:
    """The rule that wrote a record; None where the record does not tell it."""
    names = rules_of(record.kind)
    match record.kind:
        case "checkpoint":
            return rule_of(record.name)
        case "sample":
            return "sample_chat" if record.name in _SAMPLE_CHATS else "sample_corpus"
        case "raw" if record.outputs:
            # <data>/raw/SOURCE/FILE, <data>/hub/OWNER/MODEL/FILE, <data>/hub/datasets/OWNER/NAME@COMMIT/...
            above = Path(record.outputs[0].path).parts[:-2]
            if above[-1:] == ("raw",):
                return "download"
            return "download_model" if above[-2:-1] == ("hub",) else "download_task_data"
    return names[0] if len(names) == 1 else None

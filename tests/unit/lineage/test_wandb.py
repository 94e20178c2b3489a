"""The W&B view of a training, against records written by hand; the wandb client is the real one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from snaketron.files import sha256
from snaketron.lineage.record import Entry, making
from snaketron.lineage.walk import ancestors, record_of
from snaketron.lineage.wandb import Tracker
from snaketron.train.metrics import Metrics
from tests.wandb_log import read_runs

import numpy as np
import pytest
import torch

CONFIG = {"settings": {"seed": 1}, "run": {"log_interval": 2}}
LINES: list[dict[str, Any]] = [
    {"iteration": 0, "valid_loss": 7.5},
    {"iteration": 2, "loss": 6.25, "timing": {"seconds": 1.5}},
    {"iteration": 2, "valid_loss": 6.5},
]
SECRET = "secretvalue"


def write(path: str, text: str = "") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text or path)
    return file


def make(kind: str, name: str, record: str, inputs: list[Path], *outputs: str) -> Path:
    """Write the outputs of a step and its record."""
    with making(kind, name, outputs={path: Path(path) for path in outputs}, record=Path(record)) as job:
        for path, aside in job.aside.items():
            aside.write_text(path)
        job.inputs = {"input": inputs}
    return Path(record)


def make_checkpoint(stage: str, key: str, inputs: list[Entry]) -> Entry:
    """Write a finished training; it, as an input of the next one."""
    directory = Path("ckpt", stage)
    write(str(directory / "config.yaml"), json.dumps(CONFIG))
    write(str(directory / "metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in LINES))
    with making("checkpoint", stage, outputs={}, record=directory / "record.json") as job:
        job.inputs, job.key = {"input": inputs}, key
    return Entry("base", str(directory), version=f"{stage}-{key}")


def entry(path: str) -> Entry:
    return Entry("input", path, sha256(Path(path)))


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """The inputs of an SFT after a pretraining phase, in a working directory with all that they lead to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb" / name.split("_")[1].lower()))
    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    texts = [write(f"raw/docs_{i}.jsonl") for i in range(2)]
    make("tokenizer", "tokenizer", "data/tokenizer/record.json", texts[:1], "data/tokenizer/tokenizer.json")
    tokenizer = Path("data/tokenizer/tokenizer.json")
    shards = [
        make("tokens", f"docs/{i}", f"data/docs/{i}.json", [text, tokenizer], f"data/docs/{i}.bin")
        for i, text in enumerate(texts)
    ]
    make("blend", "broad", "data/pretrain/broad/record.json", shards, "data/pretrain/broad/blend.json")
    pretraining = [entry("data/pretrain/broad/blend.json"), entry(str(tokenizer))]
    base = make_checkpoint("pretrain/broad", "0123456789ab", pretraining)
    make("sample", "questions", "data/sample/questions/record.json", [], "data/sample/questions/0.jsonl")
    chats = [Path("data/sample/questions/0.jsonl"), tokenizer]
    make("render_chat", "questions/0", "data/chat/questions/0.json", chats, "data/chat/questions/0.parquet")
    rendered = [Path("data/chat/questions/0.parquet")]
    packs = make("pack_sft", "questions/0", "data/sft/questions/0.json", rendered, "data/sft/train/0.parquet")
    make("blend_sft", "sft", "data/sft/record.json", [packs], "data/sft/blend.json")
    return [entry("data/sft/blend.json"), entry(str(tokenizer)), base]


def train(inputs: list[Entry], key: str = "ba9876543210", lines: int = len(LINES)) -> None:
    """A tracked SFT, without the training."""
    tracker = Tracker("offline", Path("ckpt", f"sft-{key}"), "sft", inputs, CONFIG)
    for line in LINES[:lines]:
        tracker.log(line)
    directory = Path("ckpt/sft")
    make_checkpoint("sft", key, inputs)
    directory.rename(f"ckpt/sft-{key}")
    tracker.finish()


def test_the_graph_leads_from_raw_text_and_chats_to_the_checkpoint(inputs):
    train(inputs)
    runs = read_runs(Path("wandb"))
    edges = {(used, made) for run in runs.values() for made in run.made for used in run.used}
    assert edges == {
        ("raw-tokenizer", "tokenizer"),
        ("raw-tokens-docs", "tokens-docs"),
        ("tokenizer", "tokens-docs"),
        ("tokens-docs", "blend-broad"),
        ("blend-broad", "checkpoint-pretrain_broad"),
        ("tokenizer", "checkpoint-pretrain_broad"),
        ("sample-questions", "render_chat-questions"),
        ("tokenizer", "render_chat-questions"),
        ("render_chat-questions", "pack_sft-questions"),
        ("pack_sft-questions", "blend_sft-sft"),
        ("blend_sft-sft", "checkpoint-sft"),
        ("tokenizer", "checkpoint-sft"),
        ("checkpoint-pretrain_broad", "checkpoint-sft"),
    }
    made = {name: digest for run in runs.values() for name, digest in run.made.items()}
    for run in runs.values():  # what is used is what was made, byte for byte
        assert all(made[name] == digest for name, digest in run.used.items() if not name.startswith("raw-"))
    files = {name: names for run in runs.values() for name, names in run.files.items()}
    assert files["tokens-docs"] == ["0.json", "1.json"]
    assert files["checkpoint-sft"] == ["config.yaml", "metrics.jsonl", "record.json"]


def test_metrics_are_those_of_the_file(inputs):
    train(inputs)
    runs = read_runs(Path("wandb"))
    # The second one was trained without tracking: its run comes from what lies on disk.
    for name, job_type in (("sft-ba9876543210", "sft"), ("pretrain_broad-0123456789ab", "pretrain")):
        run = runs[name]
        rows = {
            step: {key: value for key, value in row.items() if not key.startswith("_")}
            for step, row in run.history.items()
        }
        assert rows == {
            0: {"valid_loss": 7.5},
            2: {"loss": 6.25, "timing.seconds": 1.5, "valid_loss": 6.5},
        }
        assert run.job_type == job_type
        assert {key: run.config[key] for key in CONFIG} == CONFIG
        assert run.config.keys() == {*CONFIG, "_wandb"}


def test_nothing_secret_or_of_this_machine_is_logged(inputs):
    train(inputs)
    assert not [p for p in Path("wandb").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert not any(run.host for run in read_runs(Path("wandb")).values())
    assert not list(Path("wandb").rglob("wandb-metadata.json"))
    assert not list(Path("wandb").rglob("requirements.txt"))


def test_data_is_logged_once_and_again_when_it_changed(inputs):
    train(inputs)
    first = set(Path("wandb").glob("offline-run-*"))
    train(inputs, key="000000000000")
    second = set(Path("wandb").glob("offline-run-*")) - first
    assert [path.name.rpartition("-sft-")[2] for path in second] == ["000000000000"]
    changed = Path("data/sft/record.json")
    write(str(changed), changed.read_text() + "\n")
    train(inputs, key="111111111111")
    third = set(Path("wandb").glob("offline-run-*")) - first - second
    assert sorted(path.name.split("-")[3] for path in third) == ["blend_sft", "sft"]


def test_a_continued_training_logs_the_lines_it_kept(tmp_path):
    path, seen = tmp_path / "metrics.jsonl", []
    metrics = Metrics(path, 0)
    for line in [*LINES, {"iteration": 4, "loss": 5.0}]:
        metrics.write(**line)
    Metrics(path, 2, seen.append).write(iteration=4, loss=5.5)
    assert seen == [*LINES, {"iteration": 4, "loss": 5.5}]
    assert Metrics.read(path) == seen


def test_a_failure_of_wandb_is_one_warning(inputs, monkeypatch, caplog):
    import wandb

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to W&B")

    monkeypatch.setattr(wandb.Run, "log", fail)
    train(inputs)
    assert [record.getMessage() for record in caplog.records if record.name == "snaketron"] == [
        "W&B: ConnectionError: no route to W&B; the training goes on without it, and its files are complete"
    ]


def run_python(code: str, **environment: str) -> str:
    """Standard error of a program in a process of its own: wandb keeps the environment that it saw first."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, stderr=subprocess.PIPE, text=True).stderr


def test_online_without_a_key_says_what_to_do(inputs, tmp_path):
    message = run_python(
        "from pathlib import Path; from snaketron.lineage.wandb import Tracker\n"
        "Tracker('online', Path('ckpt/sft-0'), 'sft', [], {}).finish()",
        HOME=str(tmp_path),
    )
    assert message == (
        "W&B: RuntimeError: no API key; set WANDB_API_KEY, or configure tracking: offline; "
        "the training goes on without it, and its files are complete\n"
    )


def test_random_numbers_are_left_alone(inputs):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    train(inputs)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected


def test_off_imports_nothing_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(
        "import sys; from pathlib import Path; from snaketron.lineage.wandb import Tracker\n"
        "tracker = Tracker('off', Path('x'), 'sft', [], {})\n"
        "tracker.log({'iteration': 0}); tracker.finish()\n"
        "assert 'wandb' not in sys.modules"
    )
    assert not list(tmp_path.iterdir())


def test_ancestors_come_before_what_was_made_of_them(inputs):
    kinds = [record.kind for record in ancestors(inputs).values()]
    assert kinds == [
        *("sample", "tokenizer", "render_chat", "pack_sft", "blend_sft"),
        *("tokens", "tokens", "blend", "checkpoint"),
    ]


def test_a_file_that_was_made_again_is_not_taken_for_the_one_that_was_used(inputs):
    used = entry("data/sample/questions/0.jsonl")
    made = record_of(used)
    assert made is not None and made[0] == Path("data/sample/questions/record.json")
    assert record_of(Entry("input", used.path, "0" * 64)) is None
    assert record_of(entry("raw/docs_0.jsonl")) is None

"""The W&B view of a training, against records written by hand; the wandb client is the real one."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from snaketron.config import ArtifactKind
from snaketron.files import read_json, sha256, write_json
from snaketron.lineage.record import Entry, making, of_file
from snaketron.lineage.walk import ancestors, record_of
from snaketron.log import logger
from snaketron.tracking import artifacts
from snaketron.tracking.follow import Follower
from snaketron.tracking.sinks import Run
from tests.unit.tracking.wandb_server import serving
from tests.wandb_log import LoggedRun, read_run, read_runs

import pytest

CONFIG = {"settings": {"stage": "sft"}, "run": {"log_interval": 2}}
LINES: list[dict[str, Any]] = [
    {"iteration": 0, "valid_loss": 7.5},
    {
        "iteration": 2,
        "loss": 6.25,
        "timing": {"seconds": 1.5},
        "warnings": [{"kind": "spike", "text": "the loss rose"}],
    },
    {"iteration": 2, "valid_loss": 6.5},
]
SECRET = "secretvalue"
UPLOADED = "000000000000"  # key of the training whose packs are uploaded


def write(path: str, text: str = "") -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text or path, encoding="utf-8")
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


def made_data() -> list[Entry]:
    """The inputs of an SFT after a pretraining phase, in the working directory with all that they lead to."""
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


def run_of(inputs: list[Entry], key: str = "ba9876543210", mode: Any = "offline") -> Run:
    directory = Path(f"ckpt/versions/sft-{key}")
    directory.mkdir(parents=True, exist_ok=True)
    return Run(directory, "sft", inputs, CONFIG, mode=mode)


def leave(run: Run, lines: list[dict[str, Any]] = LINES, *, outcome: str = "finished") -> None:
    """What an SFT leaves on disk."""
    attempt = {"outcome": outcome, "iteration": lines[-1]["iteration"], "error": "ValueError: no"}
    write(str(run.version.attempts), json.dumps([{"outcome": "stopped"}] * run.attempts + [attempt]))
    write(str(run.version.config), json.dumps(CONFIG))
    write(str(run.version.metrics), "".join(json.dumps(line) + "\n" for line in lines))
    if outcome == "finished":
        with making("checkpoint", "sft", outputs={}, record=run.version.record) as job:
            job.inputs, job.key = {"input": run.inputs}, run.name.rpartition("-")[2]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 600
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def follow(run: Run) -> None:
    """Follow a training that has ended."""
    Follower(run).follow(lambda seconds: True)


@dataclass
class Offline:
    """Trainings that were tracked offline, one after the other, and what is below `wandb`."""

    runs: dict[str, LoggedRun]
    inputs: list[Entry]
    directories: list[list[str]]  # names of the runs' directories that each training added
    output: str


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offline]:
    """Two SFTs on a base that was trained without tracking, in a process that starts W&B's own once."""
    import numpy as np  # here, so that the stories in processes of their own start faster
    import torch

    directory = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch, caught() as said:
        patch.chdir(directory)
        patch.setenv("WANDB_API_KEY", SECRET)
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            patch.setenv(name, str(directory / "wandb" / name.split("_")[1].lower()))
        for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_MODE", "WANDB_RUN_GROUP"):
            patch.delenv(name, raising=False)
        inputs, directories, seen = made_data(), [], set()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        expected = random.random(), np.random.random(), torch.rand(1).item()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        for key in ("ba9876543210", UPLOADED):
            leave(run := replace(run_of(inputs, key), upload=["sft-data"] if key == UPLOADED else []))
            follow(run)
            names = {path.name for path in Path("wandb").glob("offline-run-*")} - seen
            seen |= names
            directories.append(sorted(name.split("-", 3)[3] for name in names))
        assert (random.random(), np.random.random(), torch.rand(1).item()) == expected
        yield Offline(read_runs(Path("wandb")), inputs, directories, said.getvalue())


@contextlib.contextmanager
def caught() -> Iterator[io.StringIO]:
    """What is logged, as text."""
    said = io.StringIO()
    handler, level = logging.StreamHandler(said), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield said
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_training_is_one_run_with_all_that_leads_to_it(offline: Offline):
    """Shards are no runs of their own; the phase, which was not tracked, is logged once from its files."""
    assert offline.directories == [["pretrain_broad-0123456789ab", "sft-ba9876543210"], [f"sft-{UPLOADED}"]]
    sft, base = offline.runs["sft-ba9876543210"], offline.runs["pretrain_broad-0123456789ab"]
    assert sft.made.keys() == {"model-sft"}
    assert sft.used.keys() == {
        "model-pretrain_broad",
        "sft-data",
        "tokenizer",
        "raw-questions",
        "raw-tokenizer",
    }
    assert base.made.keys() == {"model-pretrain_broad"}
    assert base.used.keys() == {"pretraining-blend-broad", "tokenizer", "raw-docs", "raw-tokenizer"}
    # One artifact, and so an edge.
    assert base.made["model-pretrain_broad"] == sft.used["model-pretrain_broad"]
    kinds = {name: kind for run in offline.runs.values() for name, kind in run.kinds.items()}
    assert kinds == {
        "model-sft": "sft-model",
        "model-pretrain_broad": "pretrained-model",
        "sft-data": "sft-data",
        "pretraining-blend-broad": "pretraining-blend",
        "tokenizer": "tokenizer",
        **dict.fromkeys(("raw-docs", "raw-questions", "raw-tokenizer"), "raw-data"),
    }
    assert {*kinds.values(), "lora-adapters"} == {*get_args(ArtifactKind)}


def test_files_are_named_with_their_hashes_and_none_is_uploaded(offline: Offline):
    base = offline.runs["pretrain_broad-0123456789ab"]
    here = Path.cwd()
    assert base.files["raw-docs"] == [
        (f"raw/docs_{i}.jsonl", sha256(here / f"raw/docs_{i}.jsonl"), (here / f"raw/docs_{i}.jsonl").as_uri())
        for i in range(2)
    ]
    assert [name for name, _, _ in base.files["pretraining-blend-broad"]] == [
        "data/docs/0.bin",
        "data/docs/1.bin",
        "data/pretrain/broad/blend.json",
    ]
    assert {name for name, run in offline.runs.items() if run.copied} == {f"sft-{UPLOADED}"}


def test_files_of_the_kinds_that_were_asked_for_are_uploaded(offline: Offline):
    """From where they lie, by W&B's own hash; the others are listed as ever."""
    listed, sent = (offline.runs[f"sft-{key}"] for key in ("ba9876543210", UPLOADED))
    blend, packs = Path("data/sft/blend.json"), Path("data/sft/train/0.parquet")
    assert sent.copied == [str(path.absolute()) for path in (blend, packs)]
    md5 = [base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode() for path in (blend, packs)]
    assert sent.files["sft-data"] == [(str(blend), md5[0], ""), (str(packs), md5[1], "")]
    others = {name: files for name, files in listed.files.items() if name not in ("sft-data", "model-sft")}
    assert others == {name: sent.files[name] for name in others}
    assert {*others} >= {"tokenizer", "raw-questions"}


def test_metrics_and_warnings_are_those_of_the_file(offline: Offline):
    for name, job_type in (("sft-ba9876543210", "sft"), ("pretrain_broad-0123456789ab", "pretrain")):
        run = offline.runs[name]
        rows = {
            step: {key: value for key, value in row.items() if not key.startswith("_")}
            for step, row in run.history.items()
        }
        assert rows == {0: {"valid_loss": 7.5}, 2: {"loss": 6.25, "timing.seconds": 1.5, "valid_loss": 6.5}}
        assert (run.job_type, run.group) == (job_type, Path.cwd().name)
        assert {key: run.config[key] for key in CONFIG} == CONFIG
        assert run.config.keys() == {*CONFIG, "_wandb"}
    assert offline.runs["sft-ba9876543210"].alerts == [("sft: spike", "step 2: the loss rose")]


def test_the_terminal_says_where_runs_are(offline: Offline):
    (place,) = Path("wandb").glob("offline-run-*-sft-ba9876543210")
    assert f"sft: W&B: kept in {place}; send it with `wandb sync {place}`" in offline.output


def test_nothing_secret_or_of_this_machine_is_logged(offline: Offline):
    assert not [p for p in Path("wandb").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert not any(run.host for run in offline.runs.values())
    assert not list(Path("wandb").rglob("wandb-metadata.json"))
    assert not list(Path("wandb").rglob("requirements.txt"))


ONLINE = """
import sys
from snaketron.tracking import wandb
from tests.unit.tracking import test_wandb as story

wandb.OPEN_S, wandb.TAKE_S = map(float, sys.argv[1:])
with story.caught() as said:
    story.%s()
print(said.getvalue())
"""


@contextlib.contextmanager
def online(
    story: Callable[[], None],
    address: str,
    directory: Path,
    opening: float = 120.0,
    taking: float = 120.0,
) -> Iterator[list[str]]:
    """Tell a story in a process of its own, since wandb keeps the environment it saw first; what was logged.

    The block runs meanwhile. W&B waits `opening` seconds for the server, and `taking` seconds at the end.
    """
    home = directory / "home"
    home.mkdir()
    here = str(Path(__file__).parents[3])
    variables = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([here, *sys.path]),
        "HOME": str(home),
    }
    variables |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}
    command = [sys.executable, "-c", ONLINE % story.__name__, str(opening), str(taking)]
    said: list[str] = []
    with subprocess.Popen(
        command, env=variables, cwd=directory, stdout=subprocess.PIPE, text=True
    ) as process:
        yield said
        said += process.communicate()[0].splitlines()
    assert process.returncode == 0


def stops_and_goes_on() -> None:
    """A training that is stopped after step 2, continued by another job, and fails there after step 4."""
    run = run_of([], mode="online")
    leave(run, LINES[:2], outcome="stopped")
    follow(run)
    run = replace(run, attempts=1, steps=2)
    leave(run, [*LINES, {"iteration": 4, "loss": 5.0}], outcome="failed")
    follow(run)


def test_online_a_run_goes_on_and_tells_of_failures(tmp_path: Path):
    with serving() as server, online(stops_and_goes_on, server.address, tmp_path) as said:
        pass
    assert said.count(f"sft: W&B: {server.address}/me/snaketron/runs/sft-ba9876543210") == 2
    rows = [(row["_step"], row.get("loss"), row.get("valid_loss")) for row in server.rows]
    assert rows == [(0, None, 7.5), (2, 6.25, None), (4, 5.0, None)]  # none twice
    assert server.alerts == ["sft: spike", "sft: failed"]
    assert server.exit_codes == [1, 1]


def ends() -> None:
    run = run_of([], mode="online")
    leave(run)
    follow(run)


@pytest.mark.parametrize(("behaviour", "timeout"), [("refuse", 120.0), ("stall", 3.0)])
def test_a_server_that_takes_nothing_leaves_an_offline_run(tmp_path: Path, behaviour: Any, timeout: float):
    with serving(behaviour) as server, online(ends, server.address, tmp_path, timeout) as said:
        pass
    assert server.requests
    (warning,) = [line for line in said if "runs are kept offline" in line]
    assert warning.startswith("W&B: the server does not take runs (")
    (run,) = read_runs(tmp_path / "wandb").values()
    assert run.history.keys() == {0, 2} and run.made.keys() == {"model-sft"}


def waits_for_the_death_of_the_server() -> None:
    run = run_of([], mode="online")

    def ended(seconds: float) -> bool:
        Path("open").touch()
        wait_for(Path("dead"))
        leave(run)
        return True

    Follower(run).follow(ended)


def test_a_server_that_dies_leaves_what_it_lacks_on_disk(tmp_path: Path):
    """The story ends with status 0, and says how to send the run later."""
    with contextlib.ExitStack() as servers:
        server = servers.enter_context(serving())
        with online(waits_for_the_death_of_the_server, server.address, tmp_path, taking=3.0) as said:
            wait_for(tmp_path / "open")
            servers.close()
            (tmp_path / "dead").touch()
    (place,) = (path.relative_to(tmp_path) for path in (tmp_path / "wandb").glob("run-*"))
    assert f"sft: W&B has not taken all within 3 s; send it with `wandb sync {place}`" in said
    assert read_run(next((tmp_path / place).glob("*.wandb"))).history.keys() == {0, 2}


def ends_on_a_full_disk() -> None:
    """No file can grow beyond 16 KiB, in W&B's own process neither."""
    run = run_of([])
    leave(run, [{"iteration": step, "loss": 1.0, "note": "x" * 1000} for step in range(100)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
    follow(run)


def test_a_full_disk_is_one_warning(tmp_path: Path):
    """W&B itself loses the lines without a word."""
    with online(ends_on_a_full_disk, "http://127.0.0.1:9", tmp_path) as said:
        pass
    (place,) = (path.relative_to(tmp_path) for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert [line for line in said if "send it with" not in line] == [
        f"sft: W&B: {place}: file too large; what it has of this run may lack the last steps, and "
        "metrics.jsonl has all",
        "",
    ]
    assert next((tmp_path / place).glob("*.wandb")).stat().st_size == 16384


def test_ancestors_come_before_what_was_made_of_them(offline: Offline):
    kinds = [record.kind for record in ancestors(offline.inputs).values()]
    assert kinds == [
        *("sample", "tokenizer", "render_chat", "pack_sft", "blend_sft"),
        *("tokens", "tokens", "blend", "checkpoint"),
    ]


def test_a_base_that_was_trained_again_is_the_artifact_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """And where its version was removed it is none: not that of now, and no raw file."""
    monkeypatch.chdir(tmp_path)
    for key in ("0a", "0b"):
        make_checkpoint(f"versions/base-{key}", key, [])
        record = Path("ckpt/versions", f"base-{key}", "record.json")
        write_json(record, read_json(record) | {"name": "base"})
        write_json(record.parent / "latest_checkpointed_iteration.txt", 0)
    Path("ckpt/base").symlink_to("versions/base-0b")
    used = Entry("base", "ckpt/base", version="base-0a")
    assert [version.directory.name for version in artifacts.trainings([used])] == ["base-0a"]
    assert [one.metadata["key"] for one in artifacts.leading_to([used], "sft")] == ["0a"]
    shutil.rmtree("ckpt/versions/base-0a")
    assert artifacts.trainings([used]) == artifacts.leading_to([used], "sft") == []
    assert "W&B: base-0a is no artifact of this run: replaced since by base-0b" in caplog.text


def test_a_model_lists_the_files_of_its_last_iteration_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also for a training elsewhere that has it as its base."""
    monkeypatch.chdir(tmp_path)
    last = Path("ckpt/versions/sft-0a/iter_0000008")
    files = [write(str(last / name)) for name in ("__0_0.distcp", "metadata.json")]
    write_json(last.parent / "latest_checkpointed_iteration.txt", 8)
    with making("checkpoint", "sft", outputs={}, record=last.parent / "record.json") as job:
        job.present = [of_file(path.name, path) for path in files]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    listed = artifacts.model(Path("../ckpt/versions/sft-0a")).files
    assert {name: (e.file.resolve(), e.sha256) for name, e in listed.items()} == {
        path.name: (tmp_path / path, sha256(tmp_path / path)) for path in files
    }


def test_a_file_that_was_made_again_is_not_taken_for_the_one_that_was_used(offline: Offline):
    used = entry("data/sample/questions/0.jsonl")
    made = record_of(used)
    assert made is not None and made[0] == Path("data/sample/questions/record.json")
    assert record_of(Entry("input", used.path, "0" * 64)) is None
    assert record_of(entry("raw/docs_0.jsonl")) is None

"""Models of the hub: what files are listed, what is used of them, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from snaketron.config import Config, ConfigError
from snaketron.log import UserError
from snaketron.sources.listing import lock_sources
from snaketron.sources.lockfile import read_lock
from snaketron.sources.models import CHECKPOINT, MODEL_FILE, HubRepository, task_data, tokenizer_model
from snaketron.sources.patience import Patience
from snaketron.sources.shards import to_download
from snaketron.sources.streams import open_stream
from tests.fake_hub import FakeHub

import pytest

PATIENCE = Patience(retries=1, stall_timeout=60, first_pause=0.01)
MODEL = {
    "README.md": b"a card",
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "tokenizer_config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second one",
    "model.safetensors.index.json": b"{ }",
    "pytorch_model.bin": b"pickled",
    "modeling_tiny.py": b"print()",
    "original/consolidated.safetensors": b"again",
}


def config(path: str | None) -> Config:
    return Config(tokenizer={"path": path})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with FakeHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        hub.commit("lab/tiny", MODEL)
        yield hub


def test_a_model_is_pinned_with_the_files_in_its_root_that_can_be_used(hub: FakeHub):
    lock_sources(config("lab/tiny"), patience=PATIENCE)
    commit = hub.branches["lab/tiny"]["main"]
    entry = json.loads(Path("sources.lock.json").read_text(encoding="utf-8"))["models"]["lab/tiny"]
    assert entry["request"] == {"model": "lab/tiny", "revision": "main"} and entry["revision"] == commit
    names = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [file["name"] for file in entry["files"]] == names
    for file in entry["files"]:
        content = MODEL[file["name"]]
        assert (file["size"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert file["address"] == f"hf://lab/tiny@{commit}/{file['name']}"
    # The hub knows the hashes of large files, so the weights were not read for them.
    assert not [request.path for request in hub.requests if "safetensors" in request.path]
    stream = open_stream(entry["files"][1]["address"], 2, 20)
    assert (stream.size, b"".join(stream.blocks)) == (5, b"rst")


def test_each_use_of_a_model_needs_its_own_files(hub: FakeHub):
    made = config("lab/tiny")
    lock_sources(made, patience=PATIENCE)
    lock = read_lock("sources.lock.json")
    tokenizer = tokenizer_model(made)
    assert tokenizer is not None
    root = "<data>/hub/lab/tiny"
    assert tokenizer.files(lock) == [
        f"{root}/{name}" for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    ]
    assert to_download(made, lock) == "To download: lab/tiny 3 files, 12 bytes"
    checkpoint = HubRepository("lab/tiny", "sft.base", CHECKPOINT)
    assert [path.rpartition("/")[2] for path in checkpoint.files(lock)] == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_a_model_stays_at_its_commit_until_it_is_updated(hub: FakeHub):
    made = config("lab/tiny")
    lock_sources(made, patience=PATIENCE)
    before = Path("sources.lock.json").read_bytes()
    moved = hub.commit("lab/tiny", MODEL | {"tokenizer.json": b'{"a": 2}'})
    lock_sources(made, patience=PATIENCE)
    assert Path("sources.lock.json").read_bytes() == before
    lock_sources(made, update=True, names=["lab/tiny"], patience=PATIENCE)
    assert read_lock("sources.lock.json").models["lab/tiny"]["revision"] == moved


def test_a_model_that_trainings_begin_with_is_listed_with_its_configuration(hub: FakeHub):
    """So that a dry-run compares it before the weights are downloaded; a tokenizer needs none."""
    lock_sources(config("lab/tiny"), patience=PATIENCE)
    assert "config" not in read_lock("sources.lock.json").models["lab/tiny"]
    hub.commit("lab/base", MODEL | {"config.json": b'{"model_type": "nemotron_h"}'})
    lock_sources(Config(sft={"base": "lab/base"}), patience=PATIENCE)
    assert read_lock("sources.lock.json").models["lab/base"]["config"] == {"model_type": "nemotron_h"}
    hub.commit("lab/broken", MODEL | {"config.json": b"[1]"})
    with pytest.raises(UserError, match=r"config\.json: not the configuration of a model"):
        lock_sources(Config(sft={"base": "lab/broken"}), patience=PATIENCE)


def test_a_revision_is_part_of_the_name(hub: FakeHub):
    old = hub.commit("lab/tiny", {"tokenizer.json": b"{}"}, branch="v1")
    made = config("lab/tiny@v1")
    lock_sources(made, patience=PATIENCE)
    entry = read_lock("sources.lock.json").models["lab/tiny@v1"]
    assert (entry["request"]["revision"], entry["revision"], len(entry["files"])) == ("v1", old, 1)
    model = tokenizer_model(made)
    assert model is not None and model.directory(made) == "data/hub/lab/tiny@v1"


QUIZ = {
    "README.md": b"---\nconfigs: []\n---\n",
    "one/test-00000-of-00001.parquet": b"rows",
    "two/test.jsonl": b"{}",
    "data.tar": b"the same again",
    "quiz.py": b"print()",
    ".cache/old.parquet": b"old",
}


def test_the_data_of_a_task_is_pinned_with_the_files_of_all_its_configurations(hub: FakeHub):
    """A model of the same name is another entry; and each commit has a directory of its own."""
    tasks = [{"name": name, "data": "lab/tiny"} for name in ("mmlu_astronomy", "mmlu_anatomy")]
    made = Config(tokenizer={"path": "lab/tiny"}, eval={"tasks": [*tasks, {"name": "hellaswag"}]})
    (data,) = task_data(made).values()
    model = tokenizer_model(made)
    with pytest.raises(ConfigError) as error:
        data.files(read_lock("sources.lock.json"))
    assert str(error.value).startswith(
        "eval.tasks[0].data: lab/tiny is no directory here, and as a data set of the hub it is not listed in "
        "sources.lock.json yet. Correct it, or list it"
    )
    lock_sources(made, names=["lab/tiny"], patience=PATIENCE)
    lock = read_lock("sources.lock.json")
    assert to_download(made, lock) == "To download: lab/tiny 3 files, 12 bytes"  # nobody asked for a task
    commit = hub.commit("lab/tiny", QUIZ)
    lock_sources(made, patience=PATIENCE)
    lock = read_lock("sources.lock.json")
    root = f"<data>/hub/datasets/lab/tiny@{commit}"
    names = ["README.md", "one/test-00000-of-00001.parquet", "two/test.jsonl"]
    assert data.files(lock) == [f"{root}/{name}" for name in names]
    assert lock.file("datasets/lab/tiny", names[1]).address == f"hf://datasets/lab/tiny@{commit}/{names[1]}"
    assert model is not None and model.listed(lock)[0].address.startswith("hf://lab/tiny@")
    said = to_download(made, lock)
    assert said is not None and said.endswith("; datasets/lab/tiny 3 files, 26 bytes")
    newer = hub.commit("lab/tiny", QUIZ | {"two/test.jsonl": b"{} "})
    lock_sources(made, names=["datasets/lab/tiny"], update=True, patience=PATIENCE)
    assert data.place(read_lock("sources.lock.json")) == f"datasets/lab/tiny@{newer}"


def test_a_model_that_is_not_listed_names_the_command(hub: FakeHub):
    model = tokenizer_model(config("lab/tiny"))
    assert model is not None
    with pytest.raises(ConfigError) as error:
        model.files(read_lock("sources.lock.json", ["mine.yaml"]))
    assert str(error.value) == (
        "tokenizer.path: lab/tiny is no directory here, and as a model of the hub it is not listed in "
        "sources.lock.json yet. Correct it, or list it, and commit the file:\n"
        "  python scripts/lock_sources.py --configfile mine.yaml"
    )


def test_what_the_hub_does_not_give_says_what_to_do(hub: FakeHub):
    hub.gated.add("lab/tiny")
    with pytest.raises(UserError) as error:
        lock_sources(config("lab/tiny"), patience=PATIENCE)
    assert str(error.value).startswith(
        "tokenizer.path: lab/tiny at main: the hub gives it only to accounts that were given access. Ask for "
        "access on its page, and set HF_TOKEN to a token of that account"
    )
    with pytest.raises(UserError, match=r"tokenizer.path: lab/none at main: .*Correct the name.*HF_TOKEN"):
        lock_sources(config("lab/none"), patience=PATIENCE)
    hub.commit("lab/empty", {"README.md": b"", "model.safetensors": b"x"})
    with pytest.raises(UserError, match="lab/empty at main has none of the files that are needed"):
        lock_sources(config("lab/empty"), patience=PATIENCE)
    assert not Path("sources.lock.json").exists()


def test_a_directory_of_this_machine_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("lab/tiny").mkdir(parents=True)
    for path in (None, "lab/tiny", "/lab/tiny", "./none", "../lab", "a/b/c", "my lab/tiny", "none"):
        assert tokenizer_model(config(path)) is None


def test_the_record_of_a_downloaded_file_is_never_taken_for_a_file_of_a_model():
    files = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "merges.txt",
        "a.b.safetensors",
    ]
    others = [f"{name}.json" for name in files] + [
        "model.bin",
        "a.py",
        ".a.json",
        "a/b.json",
        "json",
        ".json",
    ]
    assert [name for name in files + others if re.fullmatch(MODEL_FILE, name)] == files

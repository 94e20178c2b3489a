"""An imported base: a version like that of a training, which opens, exports and starts trainings."""

from __future__ import annotations

import json
import resource
import runpy
import shutil
from contextlib import nullcontext
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Model
from snaketron.files import partial, sha256
from snaketron.huggingface import load
from snaketron.inference import importing
from snaketron.inference.exporting import export_checkpoint
from snaketron.inference.importing import import_base
from snaketron.inference.opening import open_checkpoint
from snaketron.jobs.version import Version
from snaketron.lineage.record import read
from snaketron.log import UserError
from snaketron.train.stage import check_base, has_optimizer
from tests.conftest import REPOSITORY
from tests.unit.huggingface.checkpoints import files
from tests.unit.train.conftest import MODEL

import pytest
import torch


@pytest.fixture
def exported(publish, tmp_path: Path) -> Path:
    """What the workflow exports of a new checkpoint."""
    publish("pretrain/one", "0a")
    export_checkpoint(tmp_path / "ckpt/pretrain/one", tmp_path / "hf/one")
    return tmp_path / "hf/one"


@pytest.fixture
def bring(tmp_path: Path, tokenizer_dir: Path):
    """bring(source, **keys of the model) imports a checkpoint as ckpt/base/one."""

    def make(source: Path, stage: str = "base/one", **keys) -> Path:
        output = tmp_path / "ckpt" / stage
        model = Model(**(MODEL | keys))
        import_base(source, output, stage=stage, model=model, tokenizer=tokenizer_dir, seq_length=32)
        return output

    return make


def test_an_import_computes_what_was_exported_and_is_exported_to_the_same_bytes(
    publish, bring, exported: Path, tmp_path: Path, tokenizer_dir: Path
):
    first = open_checkpoint(tmp_path / "ckpt/pretrain/one")
    base = bring(exported)
    opened = open_checkpoint(base)
    ids = torch.arange(3, 19)[None]
    with first.evaluating(), opened.evaluating():
        here, there = (built.module(ids, ids, None)[..., : built.vocab_size] for built in (opened, first))
    assert torch.equal(here, there)
    check_base(base, Model(**MODEL), sha256(tokenizer_dir / "tokenizer.json"))  # a training may start
    record = read(Version(base).record)
    assert record.name == "base/one" and Version(base).identity == f"base/one-{record.key}"
    assert {Path(entry.path).parent for entry in record.inputs} == {exported}
    export_checkpoint(base, tmp_path / "hf/again")
    weights = [
        {n: data for n, data in files(d).items() if "model" in n} for d in (exported, tmp_path / "hf/again")
    ]
    assert weights[0] == weights[1] and len(weights[0]) == 2


def test_an_imported_model_says_again_which_sequences_it_was_published_for(
    bring, exported: Path, tmp_path: Path
):
    """The trainings that begin with it have sequences of 32 tokens."""
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 262144}))
    export_checkpoint(bring(exported), tmp_path / "hf/again")
    assert json.loads((tmp_path / "hf/again/config.json").read_text())["max_position_embeddings"] == 262144


@pytest.mark.parametrize(("said", "again"), [(0.014, 0.014), (None, 0.02), ("small", 0.02), (0, 0.02)])
def test_an_imported_model_says_again_how_its_first_weights_were_drawn(
    bring, exported: Path, tmp_path: Path, said, again: float
):
    """No weight depends on it, so that the import is not made for the one of the configuration, 0.02."""
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"initializer_range": said}))
    export_checkpoint(bring(exported), tmp_path / "hf/again")
    assert json.loads((tmp_path / "hf/again/config.json").read_text())["initializer_range"] == again


@pytest.mark.parametrize(("said", "ends"), [([0, 3], [0, 3]), (3, [0, 3]), (None, [0])])
def test_an_imported_model_ends_its_answers_where_it_did(
    bring, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said, ends
):
    """As one that was tuned on conversations does, at the end of a turn. The tokenizer's own end is 0."""
    path = exported / "generation_config.json"
    path.write_text("[")
    with pytest.raises(UserError, match=r"generation_config\.json: not a JSON object; download or copy"):
        bring(exported)
    path.write_text(json.dumps({"eos_token_id": said}))
    base = bring(exported)
    export_checkpoint(base, tmp_path / "hf/again")
    assert json.loads((tmp_path / "hf/again/generation_config.json").read_text())["eos_token_id"] == ends
    shutil.copy(REPOSITORY / "config/chat_template.jinja", base / "tokenizer")
    monkeypatch.setattr("snaketron.model.distributed.distributed", lambda *_: nullcontext())  # it has joined
    chat = runpy.run_path(str(REPOSITORY / "scripts/chat.py"))
    with chat["_chat"](chat["parse_args"]([str(base), "--threads", "1"]), []) as opened:
        assert opened.stop[: len(ends)] == ends


def test_an_import_is_made_once_and_found_finished(bring, exported: Path):
    base = bring(exported)
    before = (base / "record.json").read_bytes(), (base / "iter_0000000/.metadata").stat().st_mtime_ns
    assert bring(exported).resolve() == base.resolve()
    assert before == (
        (base / "record.json").read_bytes(),
        (base / "iter_0000000/.metadata").stat().st_mtime_ns,
    )


def test_an_import_that_outlived_its_run_does_not_replace_a_later_one(
    bring, exported: Path, monkeypatch: pytest.MonkeyPatch
):
    """While it writes, a second run imports the model with another setting."""
    with monkeypatch.context() as outlived:

        def write(*arguments):
            outlived.undo()
            bring(exported, moe_aux_loss_coeff=0.5)
            importing._write(*arguments)

        outlived.setattr(importing, "_write", write)
        with pytest.raises(UserError, match="a run has asked for base_one-") as error:
            bring(exported)
    base = Version(Path(str(error.value).partition(":")[0]))
    assert base.describe().settings["model"]["moe_aux_loss_coeff"] == 0.5


def test_an_import_that_was_killed_begins_again_and_ends_with_the_same_bytes(
    bring, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Interrupted after ten tensors; and what a process leaves that had no time to remove anything."""

    def tensors(base: Path) -> dict[str, bytes]:
        found = files(base / "iter_0000000")
        del found[".metadata"]  # torch gives each list a random name
        return found

    base = bring(exported)
    whole, version = tensors(base), base.resolve()
    base.unlink()
    shutil.rmtree(version)
    plain, read = load._rows, []

    def rows(*arguments):
        if len(read) == 10:
            raise KeyboardInterrupt
        read.append(arguments)
        return plain(*arguments)

    with monkeypatch.context() as interrupted:
        interrupted.setattr(load, "_rows", rows)
        with pytest.raises(KeyboardInterrupt):
            bring(exported)
    assert not base.exists() and not list(version.rglob("*.distcp"))
    left = partial(version / "iter_0000000")
    left.mkdir()
    for name in ("__0_0.distcp", "__99_0.distcp"):
        (left / name).write_bytes(b"half")
    assert tensors(bring(exported)) == whole and base.resolve() == version


def test_a_checkpoint_of_megatron_without_a_record_is_imported(bring, exported: Path, tmp_path: Path):
    """As Megatron-LM leaves it: a directory with iter_* and the number of the latest."""
    version = (tmp_path / "ckpt/pretrain/one").resolve()
    for name in ("record.json", "config.yaml"):
        (version / name).unlink()
    base = open_checkpoint(bring(version))
    assert torch.isfinite(base.model.output_layer.weight).all()


def test_a_checkpoint_of_another_directory_stands_in_for_a_phase(
    publish, bring, tmp_path: Path, tokenizer_dir: Path
):
    """With its weights, and without the state of its optimizer, which the next phase does not ask it for."""
    publish("pretrain/one", "0a")
    there = (tmp_path / "ckpt/pretrain/one").resolve().rename(tmp_path / "other")
    here = bring(there, "pretrain/one")
    assert here.is_symlink() and here.resolve().name.startswith("pretrain_one-")
    record = read(Version(here).record)
    assert (record.kind, record.name, record.counts["tokens"]) == ("checkpoint", "pretrain/one", 0)
    assert {entry.name for entry in record.inputs} == {"weights"} and all(e.sha256 for e in record.inputs)
    check_base(here, Model(**MODEL), sha256(tokenizer_dir / "tokenizer.json"))
    assert has_optimizer(there) and not has_optimizer(here) and not has_optimizer(None)
    other = json.loads((there / "tokenizer/tokenizer.json").read_text())
    ids = other["model"]["vocab"]
    ids["t"], ids["h"] = ids["h"], ids["t"]
    (there / "tokenizer/tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"2 of \d+ tokens have another id"):
        bring(there, "pretrain/two")
    assert not (tmp_path / "ckpt/pretrain/two").exists()


@pytest.mark.parametrize("change", ["a merge less", "lower case"])
def test_a_tokenizer_that_divides_texts_otherwise_is_another_one(bring, exported: Path, change: str):
    """Each of its tokens has the same id here."""
    made = json.loads((exported / "tokenizer.json").read_text())
    if change == "a merge less":
        made["model"]["merges"].pop()
    else:
        made["normalizer"] = {"type": "Lowercase"}
    (exported / "tokenizer.json").write_text(json.dumps(made))
    problem = r"texts are divided into other tokens \('.*' and '.*'\); set tokenizer\.path"
    with pytest.raises(UserError, match=problem):
        bring(exported)


def test_what_cannot_be_imported_leaves_nothing(bring, exported: Path, tmp_path: Path, tokenizer_dir: Path):
    other = json.loads((exported / "tokenizer.json").read_text())
    ids = other["model"]["vocab"]
    ids["t"], ids["h"] = ids["h"], ids["t"]
    plain = (exported / "tokenizer.json").read_text()
    (exported / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"2 of \d+ tokens have another id .* set tokenizer\.path"):
        bring(exported)
    (exported / "tokenizer.json").write_text(plain)
    with pytest.raises(UserError, match=r"hidden_size: 32 in the checkpoint, 64 in the configuration"):
        bring(exported, hidden_size=64)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
    try:
        with pytest.raises((UserError, OSError)):
            bring(exported)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in (tmp_path / "ckpt/base").iterdir()] == [".one.asked"]
    assert not list((tmp_path / "ckpt/versions").glob("base*/*iter*"))
    with pytest.raises(UserError, match="neither a published checkpoint"):
        bring(tokenizer_dir)
    with pytest.raises(UserError, match=r"config\.json: no such directory"):
        bring(exported / "config.json")
    shutil.rmtree(tmp_path / "ckpt")
    assert bring(exported).is_dir()

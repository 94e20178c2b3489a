"""The checkpoints that trainings begin with: what a dry-run says of them from their configurations alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

from snaketron.config import Config, ConfigError, load
from snaketron.graph.base import BaseGraph
from snaketron.graph.raw_files import RawFiles
from snaketron.huggingface.config import published
from snaketron.huggingface.index import INDEX
from snaketron.lineage.record import making, of_user
from snaketron.settings.training import train_settings
from snaketron.sources.formats import FETCH, IS_POINTER
from snaketron.sources.lockfile import Lock
from tests.unit.huggingface.checkpoints import MODEL, values, write

import pytest
import torch
import yaml
from safetensors.torch import save_file

NO_TENSORS = (2).to_bytes(8, "little") + b"{}"  # a file of safetensors


def graph(**sections: dict) -> BaseGraph:
    return BaseGraph(load(sections, {}), Lock(Path("sources.lock.json"), {}))


def vocabulary(**ids: int) -> str:
    return json.dumps({"model": {"vocab": ids}, "added_tokens": [{"content": "<e>", "id": 0}]})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A published checkpoint of the default model: its configuration, and files that nobody reads here."""
    directory = tmp_path / "published"
    directory.mkdir()
    values = published(
        Config().model, vocab_size=2048, seq_length=64, dtype="float32", eos_token_id=0, pad_token_id=1
    )
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "tokenizer.json").write_text(vocabulary(a=1, b=2))
    (directory / "model.safetensors").write_bytes(NO_TENSORS)
    return directory


def test_without_bases_trainings_start_as_before():
    bases = graph()
    assert [bases.start(section) for section in ("pretrain", "sft", "lora")] == [None] * 3


def test_a_published_checkpoint_is_imported_once_for_all_that_begin_with_it(checkpoint: Path):
    path = str(checkpoint)
    bases = graph(tokenizer={"path": path}, sft={"base": path}, lora={"base": path})
    (name,) = bases.bases
    assert bases.start("sft") == bases.start("lora") == f"<ckpt>/base/{name}"
    assert name.startswith("published_") and bases.start("pretrain") is None
    job = SimpleNamespace(base=name)
    assert [Path(file).name for file in bases.files(job)] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (bases.directory(job), bases.seq_length(job)) == (path, 1024)


@pytest.mark.parametrize("key", ["base", "checkpoint"])
def test_weights_that_an_older_file_replaces_are_imported_again(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, key: str
):
    """As `cp -p` and `rsync -a` do it: Snakemake compares times, and would keep what was imported before."""
    monkeypatch.chdir(checkpoint.parent)
    blend = [{"corpus": "docs", "weight": 1}]
    phase = {"name": "one", "tokens": 1000000, "blend": blend, "checkpoint": str(checkpoint)}
    section = {"sft": {"base": str(checkpoint)}} if key == "base" else {"pretrain": {"phases": [phase]}}
    bases = graph(tokenizer={"path": str(checkpoint)}, **section)
    (name,) = bases.bases
    stage = f"base/{name}" if key == "base" else "pretrain/one"
    job = SimpleNamespace(**({"base": name} if key == "base" else {"phase": "one"}))
    weights = checkpoint / "model.safetensors"
    with making("checkpoint", stage, outputs={}, record=Path(f"ckpt/{stage}/record.json")) as made:
        made.inputs = {"weights": [of_user(checkpoint / "config.json"), of_user(weights)]}

    def seen() -> tuple[set[str], set[str]]:
        """The files that are as they were, and those that a new start would run the job again for."""
        workflow = SimpleNamespace(iocache=SimpleNamespace(mtime={}))
        bases.raw_files = RawFiles(workflow, Path("ckpt"), Path("hashes"))
        files = bases.files(job)
        same = {Path(file).name for file in files if getattr(file, "flags", {}).get("ancient")}
        return same, {Path(file).name for file in workflow.iocache.mtime}

    assert seen() == ({"config.json", weights.name}, set())
    weights.touch()
    assert seen() == ({"config.json", weights.name}, set())
    weights.write_text("other")
    os.utime(weights, (1_000_000_000, 1_000_000_000))
    assert seen() == ({"config.json"}, {weights.name})


def test_keys_on_which_no_weight_depends_import_nothing_again(checkpoint: Path):
    path = str(checkpoint)
    models = [
        graph(tokenizer={"path": path}, sft={"base": path}, model=model).model(None)
        for model in ({}, {"precision": "bf16", "moe_aux_loss_coeff": 0.5}, {"moe_router_topk": 2})
    ]
    assert len(set(models)) == 1


def test_everything_that_differs_is_said_at_once(checkpoint: Path, tmp_path: Path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.json").write_text(vocabulary(a=1, b=3))
    with pytest.raises(ConfigError) as refused:
        graph(
            tokenizer={"path": str(own), "vocab_size": 4096},
            sft={"base": str(checkpoint)},
            lora={"base": str(tmp_path / "nowhere")},
            model={"hidden_size": 64, "mtp_num_layers": 0},
        )
    assert str(refused.value).splitlines() == [
        "sft.base: model.mtp_num_layers: 0 in the configuration, and the checkpoint has a block of "
        "multi-token prediction; set it to 1 or more",
        "sft.base: model.hidden_size: 128 in the checkpoint, 64 in the configuration",
        "sft.base: vocab_size: 2048 in the checkpoint, fewer than the 4096 tokens of the tokenizer",
        f"sft.base: tokenizer.path {own}: 1 of the 3 tokens of the checkpoint have another id there; set "
        f"tokenizer.path: {checkpoint}",
        f"lora.base: '{tmp_path}/nowhere' is no directory, and no OWNER/NAME of the Hugging Face hub",
    ]


def test_keys_that_nobody_reads_are_named_before_anything_runs(checkpoint: Path):
    keys: dict[str, dict] = {"tokenizer": {"path": str(checkpoint)}, "sft": {"base": str(checkpoint)}}
    assert list(graph(**keys).unread()) == []
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(values | {"logit_scale": 0.5}))
    (said,) = graph(**keys).unread()
    assert said.startswith("sft.base: config.json says logit_scale: 0.5, which is not read here")


def refused(**sections: dict) -> list[str]:
    with pytest.raises(ConfigError) as error:
        graph(**sections)
    return str(error.value).splitlines()


def test_weights_that_are_not_there_are_named_before_anything_runs(checkpoint: Path):
    keys: dict[str, dict] = {"tokenizer": {"path": str(checkpoint)}, "sft": {"base": str(checkpoint)}}
    (checkpoint / "model.safetensors").unlink()
    at = f"sft.base: {checkpoint}:"
    assert refused(**keys) == [f"{at} neither {INDEX} nor model.safetensors is there"]
    files = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": files}))
    (checkpoint / "one.safetensors").write_bytes(NO_TENSORS)
    assert refused(**keys) == [f"{at} two.safetensors: missing, with 2 tensors"]
    (checkpoint / "two.safetensors").symlink_to("blobs/none")  # as a cache of the hub is copied
    assert refused(**keys) == [f"{at} two.safetensors: missing, with 2 tensors"]
    (checkpoint / INDEX).write_text("{")
    (line,) = refused(**keys)
    assert line.startswith(f"{at} {INDEX}: not an index of safetensors (JSONDecodeError: ")


def test_weights_that_are_cut_are_named_before_anything_runs(checkpoint: Path):
    """By the sizes and heads of their files: the last of 4 numbers of 4 bytes lacks a byte."""
    keys: dict[str, dict] = {"tokenizer": {"path": str(checkpoint)}, "sft": {"base": str(checkpoint)}}
    weights, at = checkpoint / "model.safetensors", f"sft.base: {checkpoint}: model.safetensors:"
    save_file({"a": torch.zeros(4)}, weights)
    graph(**keys)
    whole = weights.read_bytes()
    for content, problem in (
        (whole[:-1], f"{len(whole) - 1} bytes, where its head promises {len(whole)}"),
        (whole[:20], "damaged (20 bytes); copy it again"),
        (b"", "damaged (0 bytes); copy it again"),
        (b"\2\0\0\0\0\0\0\0[]", "damaged (10 bytes); copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", f"{IS_POINTER}; {FETCH}"),
    ):
        weights.write_bytes(content)
        assert refused(**keys) == [f"{at} {problem}"]


def test_files_that_cannot_be_read_are_named(checkpoint: Path, tmp_path: Path):
    """The files of a published checkpoint; and of one of Megatron that was converted and never trained."""
    released = tmp_path / "released"
    (released / "iter_0000001").mkdir(parents=True)
    (released / "latest_checkpointed_iteration.txt").write_text("release")
    (checkpoint / "tokenizer.json").write_text("[]")
    own = tmp_path / "own"
    own.mkdir()
    (own / "tokenizer.json").write_text(vocabulary(a=1, b=2))
    keys = {
        "tokenizer": {"path": str(own)},
        "sft": {"base": str(checkpoint)},
        "lora": {"base": str(released)},
    }
    problem = "'release' is no iteration; name the directory that holds .metadata"
    unread = f"lora.base: {released}/latest_checkpointed_iteration.txt: {problem}"
    with pytest.raises(ConfigError) as refused:
        graph(**keys)
    there, last = str(refused.value).splitlines()
    assert there.startswith(f"sft.base: {checkpoint}/tokenizer.json: not a tokenizer (") and last == unread
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(ConfigError) as refused:
        graph(**keys)
    wrong = f"sft.base: {checkpoint}/config.json: not a configuration of a model; download or copy it again"
    assert str(refused.value).splitlines() == [wrong, unread]


def test_a_tokenizer_of_ones_own_does_not_fit_a_published_checkpoint(checkpoint: Path, tmp_path: Path):
    """Unless it is the one that the checkpoint was exported with."""
    roots = {"data": str(tmp_path / "data")}
    with pytest.raises(ConfigError, match=rf"trains a tokenizer .* set tokenizer\.path: {checkpoint}"):
        graph(pathvars=roots | {"ckpt": "ckpt"}, sft={"base": str(checkpoint)})
    (tmp_path / "data/tokenizer").mkdir(parents=True)
    (tmp_path / "data/tokenizer/tokenizer.json").write_text(vocabulary(b=2, a=1))
    assert graph(pathvars=roots | {"ckpt": "ckpt"}, sft={"base": str(checkpoint)}).start("sft")


def test_a_checkpoint_of_this_workflow_is_taken_as_it_is(tmp_path: Path):
    settings = train_settings(load({"model": {"hidden_size": 64}}, {}), "sft").model_dump()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"settings": settings}))
    (tmp_path / "record.json").write_text("{}")
    write(tmp_path / "iter_0000002", values(MODEL))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    same = {"base": str(tmp_path)}
    assert graph(pretrain=same, model={"hidden_size": 64}).start("pretrain") == str(tmp_path)
    with pytest.raises(ConfigError) as refused:
        graph(pretrain=same, lora=same)
    assert str(refused.value) == (
        "pretrain.base and lora.base: model.hidden_size: 64 in the checkpoint, 128 in the configuration"
    )
    part = next((tmp_path / "iter_0000002").glob("*.distcp"))
    part.unlink()
    with pytest.raises(ConfigError, match=rf"pretrain\.base: {part}: no such file"):
        graph(pretrain=same, model={"hidden_size": 64})
    shutil.rmtree(tmp_path / "iter_0000002")
    with pytest.raises(ConfigError, match=r"pretrain\.base: .*: its last step is not there; restore it"):
        graph(pretrain=same, model={"hidden_size": 64})
    (tmp_path / "config.yaml").write_text("settings: [1]")
    with pytest.raises(ConfigError) as refused:
        graph(pretrain=same)
    assert (
        str(refused.value)
        == f"pretrain.base: {tmp_path}/config.yaml: not the configuration of a checkpoint; "
        "name one that this workflow made, or restore the file"
    )


def test_no_training_starts_from_what_is_made_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Snakemake would say `Cyclic dependency on rule sft`."""
    monkeypatch.chdir(tmp_path)
    version = tmp_path / "ckpt/versions/sft-1"
    settings = train_settings(load({}, {}), "sft").model_dump()
    write(version / "iter_0000002", values(MODEL))
    (version / "config.yaml").write_text(yaml.safe_dump({"settings": settings}))
    (version / "record.json").write_text("{}")
    (version / "latest_checkpointed_iteration.txt").write_text("2")
    Path("ckpt/sft").symlink_to("versions/sft-1")
    sft = {"base": "ckpt/sft"}
    for sections in ({"sft": sft}, {"pretrain": sft}):
        with pytest.raises(ConfigError) as refused:
            graph(**sections)
        (section,) = sections
        assert str(refused.value) == (
            f"{section}.base: ckpt/sft is made from it; name the version that it leads to now, "
            "ckpt/versions/sft-1, or give this configuration another pathvars.ckpt"
        )
    assert graph(sft={"base": "ckpt/versions/sft-1"}).start("sft") == "ckpt/versions/sft-1"
    assert graph(sft=sft, pathvars={"ckpt": "second"}).start("sft") == "ckpt/sft"
    assert graph(lora=sft).start("lora") == "ckpt/sft"  # another training, which SFT does not need


def test_a_checkpoint_may_be_the_result_of_a_phase(checkpoint: Path, tmp_path: Path):
    """It is imported in place of training the phase, with the length of its sequences, and not as a base."""
    path, blend = str(checkpoint), [{"corpus": "docs", "weight": 1}]
    phases = [{"name": "one", "tokens": 99_999, "blend": blend, "checkpoint": path, "seq_length": 64}]
    phases += [{"name": "two", "tokens": 300_000, "blend": blend}]
    bases = graph(tokenizer={"path": path}, pretrain={"phases": phases}, sft={"base": path})
    assert bases.start("pretrain") is None and bases.start("sft") == f"<ckpt>/base/{next(iter(bases.bases))}"
    job = SimpleNamespace(phase="one")
    assert [Path(file).name for file in bases.files(job)] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (bases.directory(job), bases.seq_length(job)) == (path, 64)
    with pytest.raises(ConfigError) as refused:
        graph(
            tokenizer={"path": path},
            pretrain={"phases": [phases[0] | {"checkpoint": str(tmp_path / "nowhere")}, phases[1]]},
            sft={"base": path},
            model={"hidden_size": 64},
        )
    assert str(refused.value).splitlines() == [
        "sft.base: model.hidden_size: 128 in the checkpoint, 64 in the configuration",
        f"pretrain.phases[0].checkpoint: '{tmp_path}/nowhere' is no directory, and no OWNER/NAME of the "
        "Hugging Face hub",
    ]


def test_a_given_phase_leaves_no_other_beginning(checkpoint: Path):
    path, blend = str(checkpoint), [{"corpus": "docs", "weight": 1}]
    phases = [
        {"name": name, "tokens": 200_000, "blend": blend, "checkpoint": path} for name in ("one", "two")
    ]
    with pytest.raises(ConfigError) as refused:
        graph(tokenizer={"path": path}, pretrain={"phases": phases, "base": path})
    assert str(refused.value).splitlines() == [
        f"{key}: has no effect, because the checkpoint of pretrain.phases[1] is given; leave it out"
        for key in ("pretrain.phases[0].checkpoint", "pretrain.base")
    ]


def test_a_model_of_the_hub_is_compared_by_the_configuration_in_the_lock_file(checkpoint: Path):
    """Before anything is downloaded."""
    values = json.loads((checkpoint / "config.json").read_text()) | {"hidden_size": 256, "logit_scale": 0.5}
    entry = {"request": {"model": "lab/base", "revision": "main"}, "revision": "0a", "files": []}
    lock = Lock(Path("lock.json"), {}, models={"lab/base": entry | {"config": values}})
    keys = {"tokenizer": {"path": "lab/base", "vocab_size": 4096}, "sft": {"base": "lab/base"}}
    with pytest.raises(ConfigError) as refused:
        BaseGraph(load(keys, {}), lock)
    assert str(refused.value).splitlines() == [
        "sft.base: model.hidden_size: 256 in the checkpoint, 128 in the configuration",
        "sft.base: vocab_size: 2048 in the checkpoint, fewer than the 4096 tokens of the tokenizer",
    ]
    fitting = {**keys, "tokenizer": {"path": "lab/base"}, "model": {"hidden_size": 256}}
    (said,) = BaseGraph(load(fitting, {}), lock).unread()
    assert "logit_scale: 0.5" in said


def test_a_model_of_the_hub_is_downloaded_first(tmp_path: Path):
    """A lock file without its configuration: it is compared when it is here."""
    name = "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16"
    file = {"name": "config.json", "address": "https://x", "size": 1, "sha256": "0" * 64}
    request = {"model": name, "revision": "main"}
    lock = Lock(Path("lock.json"), {}, models={name: {"request": request, "files": [file]}})
    config = load({"tokenizer": {"path": name}, "sft": {"base": name}}, {})
    bases = BaseGraph(config, lock)
    (base,) = bases.bases
    job = SimpleNamespace(base=base)
    assert bases.files(job) == [f"<data>/hub/{name}/config.json"]
    assert bases.directory(job) == f"data/hub/{name}"
    with pytest.raises(ConfigError, match="a model of the hub: there is no such directory here"):
        graph(sft={"base": name})


def test_of_a_directory_of_megatron_the_complete_iteration_is_imported(tmp_path: Path):
    """Not one that is being written, nor what a person put aside."""
    made = tmp_path / "made"
    for name in ("iter_0000002", "iter_0000004", "iter_0000002.bak"):
        write(made / name, values(MODEL))
    (made / "latest_checkpointed_iteration.txt").write_text("2")
    bases = graph(model=MODEL.model_dump(), tokenizer={"path": str(made)}, sft={"base": str(made)})
    (name,) = bases.bases
    assert {Path(file).parent for file in bases.files(SimpleNamespace(base=name))} == {made / "iter_0000002"}


def test_a_checkpoint_of_megatron_is_compared_by_the_list_of_its_tensors(tmp_path: Path):
    """A checkpoint without one tensor, another one reshaped; the last of its two iterations counts."""
    found = values(MODEL)
    found["decoder.layers.3.mlp.linear_fc1.weight"] = torch.zeros(25, 16)
    del found["decoder.final_norm.weight"]
    write(tmp_path / "made/iter_0000002", found)
    (tmp_path / "made/iter_0000001").mkdir()
    (tmp_path / "made/latest_checkpointed_iteration.txt").write_text("2")
    model = MODEL.model_dump()
    tokenizer = {"path": str(tmp_path / "made")}
    with pytest.raises(ConfigError) as refused:
        graph(model=model, tokenizer=tokenizer, sft={"base": str(tmp_path / "made")})
    lines = str(refused.value).splitlines()
    assert lines == [
        "sft.base: decoder.layers.3.mlp.linear_fc1.weight: [25, 16], and the model wants [24, 16]",
        "sft.base: decoder.final_norm.weight: missing",
    ]

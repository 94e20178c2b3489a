"""Exports: what is in them, that they are complete or absent, and what is refused."""

from __future__ import annotations

import json
import resource
import weakref
from pathlib import Path

from snaketron.config import Model
from snaketron.huggingface import shards
from snaketron.huggingface.config import TOKENIZER_FILES
from snaketron.huggingface.index import INDEX
from snaketron.huggingface.torch_dist import Reader
from snaketron.log import UserError
from tests.unit.huggingface.checkpoints import MODEL, ROWS, TOKENS, export_of, files, values, write

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "iter_0000001", values())


def test_an_export_holds_the_tensors_without_padding_in_files_of_the_wanted_size(checkpoint, tmp_path: Path):
    """safetensors itself reads what was written."""
    found, here = values(), export_of(checkpoint, tmp_path / "hf", shard_bytes=20_000)
    index = json.loads((here / INDEX).read_bytes())
    names = sorted(path.name for path in here.glob("*.safetensors"))
    assert names == [f"model-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 3 and set(index["weight_map"].values()) == set(names)
    loaded = {}
    for name in names:
        there = load_file(here / name)
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == set(there)
        assert len(there) == 1 or sum(tensor.nbytes for tensor in there.values()) <= 20_000
        loaded |= there
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded.values())
    embedding = found["embedding.word_embeddings.weight"]
    assert embedding.shape[0] == ROWS and torch.equal(
        loaded["backbone.embeddings.weight"], embedding[:TOKENS]
    )
    expert = found["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"][3]
    assert torch.equal(loaded["backbone.layers.1.mixer.experts.3.down_proj.weight"], expert)
    in_proj = [found[f"decoder.layers.0.mixer.in_proj.weight.{part}"] for part in ("z", "x", "B", "C", "dt")]
    assert torch.equal(loaded["backbone.layers.0.mixer.in_proj.weight"], torch.cat(in_proj))


def test_a_model_in_bf16_keeps_its_types_and_the_routers_bias_in_fp32(tmp_path: Path):
    found = values(dtype=torch.bfloat16)
    here = export_of(write(tmp_path / "ckpt", found), tmp_path / "hf")
    loaded = load_file(here / "model-00001-of-00001.safetensors")
    fp32 = {name for name, tensor in loaded.items() if tensor.dtype is torch.float32}
    assert fp32 == {name for name in loaded if name.endswith("e_score_correction_bias")} and len(fp32) == 2
    assert json.loads((here / "config.json").read_bytes())["torch_dtype"] == "bfloat16"


def test_config_json_says_what_transformers_and_vllm_want(checkpoint, tmp_path: Path):
    config = json.loads((export_of(checkpoint, tmp_path / "hf") / "config.json").read_bytes())
    assert config["num_nextn_predict_layers"] == 1 and MODEL.mtp_num_layers == 2  # the depths share a block
    assert (config["hybrid_override_pattern"], config["mtp_hybrid_override_pattern"]) == ("ME*-", "*E")
    assert (config["vocab_size"], config["time_step_min"], config["norm_topk_prob"]) == (TOKENS, 1e-12, True)
    generation = json.loads((tmp_path / "hf/generation_config.json").read_bytes())
    assert generation == {"eos_token_id": [0, 3], "pad_token_id": 1}


def test_the_tokenizer_and_its_template_come_along(checkpoint, tmp_path: Path):
    (tmp_path / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        (tmp_path / "tokenizer" / name).write_text(name)
    here = export_of(checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    assert {name: (here / name).read_text() for name in TOKENIZER_FILES} == {
        name: name for name in TOKENIZER_FILES
    }
    record = json.loads((here / "record.json").read_bytes())
    outputs = {entry["name"]: entry for entry in record["outputs"]}
    assert outputs.keys() == files(here).keys()
    assert all(entry["bytes"] == len(files(here)[name]) for name, entry in outputs.items())
    assert outputs["config.json"]["path"] == str(here / "config.json")


def test_a_tensor_of_megatron_is_read_once_and_then_forgotten(checkpoint, tmp_path: Path, monkeypatch):
    """So memory is bounded by the largest one, whatever the number of layers and files."""
    reads: list[str] = []
    alive: list[weakref.ref] = []
    plain = Reader.read

    def read(self: Reader, key: str) -> torch.Tensor:
        reads.append(key)
        assert sum(tensor() is not None for tensor in alive) <= (4 if ".mixer." in key else 0)
        made = plain(self, key)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Reader, "read", read)
    export_of(checkpoint, tmp_path / "hf", shard_bytes=20_000)
    assert sorted(reads) == sorted(values())


def test_killed_and_run_again_it_goes_on_and_ends_with_the_same_bytes(
    checkpoint, tmp_path: Path, monkeypatch
):
    """Killed after three files, of which one is damaged then; and a fourth is half-written."""
    whole = files(export_of(checkpoint, tmp_path / "whole", shard_bytes=20_000))
    plain, written = shards.write_shard, []

    def write(path: Path, *arguments):
        if len(written) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return plain(path, *arguments)

    monkeypatch.setattr(shards, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        export_of(checkpoint, tmp_path / "hf", shard_bytes=20_000)
    assert not (tmp_path / "hf").exists()
    left, names = tmp_path / ".hf.partial", sorted(name for name in whole if name.startswith("model-"))
    assert written == names[:3]
    (left / "model-00001-of-00099.safetensors").write_bytes(b"another")
    (left / names[1]).write_bytes((left / names[1]).read_bytes()[:-1] + b"?")
    written.clear()
    monkeypatch.setattr(
        shards, "write_shard", lambda path, *more: written.append(path.name) or plain(path, *more)
    )
    assert files(export_of(checkpoint, tmp_path / "hf", shard_bytes=20_000)) == whole and not left.exists()
    assert written == [names[1], *names[3:]]


def test_files_of_another_checkpoint_are_not_kept(checkpoint, tmp_path: Path, monkeypatch):
    other = write(tmp_path / "other", {key: tensor + 1 for key, tensor in values().items()})
    whole = files(export_of(other, tmp_path / "whole", shard_bytes=20_000))
    with monkeypatch.context() as stopped:
        stopped.setattr(shards, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_of(checkpoint, tmp_path / "hf", shard_bytes=20_000)
    assert len(list((tmp_path / ".hf.partial").glob("*.safetensors"))) > 3
    assert files(export_of(other, tmp_path / "hf", shard_bytes=20_000)) == whole


def test_all_differences_are_named_at_once(tmp_path: Path):
    found = values()
    del found["decoder.final_norm.weight"]
    found["decoder.layers.3.mlp.linear_fc1.weight"] = torch.zeros(25, 16)
    found["decoder.layers.2.self_attention.linear_proj.weight"] = torch.zeros(16, 16, dtype=torch.float16)
    found["decoder.layers.4.mixer.D"] = torch.zeros(4)
    directory = write(tmp_path / "ckpt", found)
    with pytest.raises(UserError) as refused:
        export_of(directory, tmp_path / "hf")
    assert str(refused.value).splitlines() == [
        f"{directory} does not hold the model of its settings:",
        "decoder.layers.2.self_attention.linear_proj.weight: of type torch.float16; only float32 and "
        "bfloat16 are read",
        "decoder.layers.3.mlp.linear_fc1.weight: [25, 16], and the model wants [24, 16]",
        "decoder.final_norm.weight: missing",
        "decoder.layers.4.mixer.D: not of this model",
    ]
    assert not (tmp_path / "hf").exists()


def test_numbers_that_are_not_finite_are_refused_with_the_names_of_all_tensors(tmp_path: Path):
    found = values()
    found["decoder.layers.0.mixer.dt_bias"][1] = torch.nan
    found["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"][3, 0, 0] = torch.inf
    found["output_layer.weight"][5] = -torch.inf
    directory = write(tmp_path / "ckpt", found)
    with pytest.raises(UserError) as refused:
        export_of(directory, tmp_path / "hf", shard_bytes=20_000)
    assert str(refused.value).splitlines() == [
        f"{directory} holds numbers that are not finite, in 3 tensors:",
        "backbone.layers.0.mixer.dt_bias",
        "backbone.layers.1.mixer.experts.3.down_proj.weight",
        "lm_head.weight",
    ]
    assert not (tmp_path / "hf").exists() and not (tmp_path / ".hf.partial").exists()


def test_files_with_numbers_that_are_not_finite_are_not_kept_for_an_export_that_goes_on(
    tmp_path: Path, monkeypatch
):
    """The first file holds one, and the export is killed after the second."""
    found = values()
    found["embedding.word_embeddings.weight"][0, 0] = torch.nan
    directory = write(tmp_path / "ckpt", found)
    plain, written = shards.write_shard, []

    def write_shard(path: Path, *arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return plain(path, *arguments)

    with monkeypatch.context() as stopped:
        stopped.setattr(shards, "write_shard", write_shard)
        with pytest.raises(KeyboardInterrupt):
            export_of(directory, tmp_path / "hf", shard_bytes=20_000)
    with pytest.raises(UserError, match=r"in 1 tensor:\nbackbone.embeddings.weight"):
        export_of(directory, tmp_path / "hf", shard_bytes=20_000)


@pytest.mark.parametrize("damage", ["missing", "truncated", "scrambled", "no list"])
def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path: Path, damage: str):
    file = checkpoint / (".metadata" if damage == "no list" else "__0_0.distcp")
    if damage == "missing":
        file.unlink()
    elif damage == "scrambled":  # names of its parts are no UTF-8 any more
        file.write_bytes(file.read_bytes().replace(b"byteorder", b"byte\x8drder"))
    else:
        file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(UserError, match="damaged"):
        export_of(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(OSError) as error:
            export_of(checkpoint, tmp_path / "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path / "hf")  # `log.run` makes one line of it
    assert not (tmp_path / "hf").exists() and not (tmp_path / ".hf.partial").exists()


def test_top_1_routing_and_no_multi_token_prediction(tmp_path: Path):
    model = MODEL.model_copy(update={"moe_router_topk": 1, "mtp_num_layers": 0, "moe_latent_size": None})
    here = export_of(write(tmp_path / "ckpt", values(model)), tmp_path / "hf", Model(**model.model_dump()))
    config = json.loads((here / "config.json").read_bytes())
    assert config["norm_topk_prob"] is False and config["num_nextn_predict_layers"] == 0
    assert "mtp_hybrid_override_pattern" not in config and config["moe_latent_size"] is None

"""Imports: bit-exact both ways, and everything that is wrong is named at once."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from snaketron.config import Model
from snaketron.huggingface import config, torch_dist
from snaketron.huggingface.index import INDEX
from snaketron.huggingface.load import Weights, megatron_weights, published_weights
from snaketron.huggingface.metadata import listed_tensors
from snaketron.huggingface.torch_dist import Reader
from snaketron.log import UserError
from tests.conftest import run_module
from tests.unit.huggingface.checkpoints import MODEL, ROWS, TOKENS, export_of, files, values, write

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """An export in several files."""
    return export_of(write(tmp_path / "made", values()), tmp_path / "hf", shard_bytes=20_000)


def written(weights: Weights, directory: Path) -> Reader:
    directory.mkdir(parents=True)
    torch_dist.write(directory, weights.chunks, {"iteration": 0})
    assert not weights.not_finite
    return Reader(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_is_imported_bit_for_bit_and_exported_to_the_same_bytes(tmp_path: Path, dtype: torch.dtype):
    found = values(dtype=dtype)
    hf = export_of(write(tmp_path / "made", found), tmp_path / "hf", shard_bytes=20_000)
    weights = published_weights(hf, MODEL, TOKENS)
    assert weights.precision == {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    reader = written(weights, tmp_path / "imported")
    assert reader.tensors.keys() == found.keys()
    for key, tensor in found.items():
        expected = tensor.clone()
        if expected.shape[0] == ROWS:
            expected[TOKENS:] = 0  # the padding is not published
        assert reader.tensors[key] == (tuple(expected.shape), expected.dtype)
        assert torch.equal(reader.read(key), expected), key
    assert files(export_of(tmp_path / "imported", tmp_path / "again", shard_bytes=20_000)) == files(hf)


def test_a_checkpoint_of_megatron_is_taken_without_its_optimizer(tmp_path: Path):
    found = values()
    state = {"optimizer.state.exp_avg.decoder.final_norm.weight": torch.ones(16)}
    directory = write(tmp_path / "made", found | state)
    reader = written(megatron_weights(directory, MODEL, TOKENS), tmp_path / "imported")
    assert reader.tensors.keys() == found.keys()
    assert all(torch.equal(reader.read(key), tensor) for key, tensor in found.items())


def test_rows_of_the_vocabulary_that_are_not_the_tokenizers_are_padding(tmp_path: Path):
    """A published embedding of 200 rows, and 150 tokens: Megatron has 256 rows, or 160 in steps of 32."""
    hf = export_of(write(tmp_path / "made", values()), tmp_path / "hf")
    small = MODEL.model_copy(update={"make_vocab_size_divisible_by": 32})
    there = values()["output_layer.weight"]
    for model, rows, kept in ((MODEL, 256, 200), (small, 160, 160)):
        reader = written(published_weights(hf, model, 150), tmp_path / str(rows))
        here = reader.read("output_layer.weight")
        assert len(here) == rows and torch.equal(here[:kept], there[:kept]) and not here[kept:].any()


def test_a_model_that_lost_multi_token_prediction_is_imported_without_it(published: Path, tmp_path: Path):
    """As transformers saves it: config.json speaks of the block, and no file holds it."""
    index = json.loads((published / INDEX).read_bytes())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if not k.startswith("mtp.")}
    (published / INDEX).write_text(json.dumps(index))
    for path in published.glob("*.safetensors"):
        kept = {k: v.clone() for k, v in load_file(path).items() if not k.startswith("mtp.")}
        save_file(kept, path) if kept else path.unlink()
    assert refusal(published) == [
        "model.mtp_num_layers: 2 in the configuration, and the checkpoint has no block of multi-token "
        "prediction; set it to 0"
    ]
    model = MODEL.model_copy(update={"mtp_num_layers": 0})
    for single in (False, True):
        if single:
            tensors = {k: v for path in published.glob("*.safetensors") for k, v in load_file(path).items()}
            for path in (published / INDEX, *published.glob("*.safetensors")):
                path.unlink()
            save_file(tensors, published / "model.safetensors")
        reader = written(published_weights(published, model, TOKENS), tmp_path / f"made_{single}")
        for key in reader.tensors:
            assert torch.equal(reader.read(key)[:TOKENS], values()[key][:TOKENS])  # without padding
        assert reader.tensors.keys() == {key for key in values() if not key.startswith("mtp.")}


# ------------------------------------------------------------------------------------------- refused


def refusal(directory: Path, model: Model = MODEL, tokens: int = TOKENS) -> list[str]:
    with pytest.raises(UserError) as refused:
        published_weights(directory, model, tokens)
    first, *lines = str(refused.value).splitlines()
    assert first.startswith(str(directory))
    return lines


def changed(directory: Path, change: Callable[[dict], object]) -> None:
    """Change config.json."""
    found = json.loads((directory / "config.json").read_bytes())
    change(found)
    (directory / "config.json").write_text(json.dumps(found))


def test_all_keys_of_another_architecture_are_named_at_once(published: Path):
    changed(
        published, lambda c: c.update(hybrid_override_pattern="MM*-", head_dim=8, n_group=2, use_bias=True)
    )
    changed(published, lambda c: c.update(n_shared_experts=0))
    changed(published, lambda c: [c.pop("n_groups"), c.pop("vocab_size")])
    assert refusal(published) == [
        "model.hybrid_layer_pattern: MM*- in the checkpoint, ME*- in the configuration",
        "model.kv_channels: 8 in the checkpoint, 4 in the configuration",
        "n_groups: missing in the checkpoint",
        "use_bias: True in the checkpoint; only False is supported",
        "n_group: 2 in the checkpoint; only 1 is supported",
        "n_shared_experts: 0 in the checkpoint; only 1 is supported",
        "vocab_size: missing in the checkpoint",
    ]


def test_values_of_another_type_are_named(published: Path):
    index = json.loads((published / INDEX).read_bytes())
    index["weight_map"]["lm_head.weight"] = 1
    (published / INDEX).write_text(json.dumps(index))
    changed(published, lambda c: [c.pop("hybrid_override_pattern"), c.update(layers_block_type=7)])
    changed(published, lambda c: c.update(vocab_size="200", num_nextn_predict_layers=None, hidden_size="16"))
    assert refusal(published)[:5] == [
        "model.hybrid_layer_pattern: ? in the checkpoint, ME*- in the configuration",
        "num_nextn_predict_layers: None in the checkpoint is no whole number",
        "model.hidden_size: '16' in the checkpoint, 16 in the configuration",
        "vocab_size: '200' in the checkpoint is no whole number",
        f"{INDEX}: not an index of safetensors (TypeError: the file of lm_head.weight is no name)",
    ]


def test_a_vocabulary_that_is_too_small_and_another_kind_of_model_are_refused(published: Path):
    assert refusal(published, tokens=201) == [
        "vocab_size: 200 in the checkpoint, fewer than the 201 tokens of the tokenizer"
    ]
    changed(published, lambda c: c.update(model_type="llama"))
    assert refusal(published) == [
        "model_type: 'llama' in the checkpoint; only nemotron_h has this architecture"
    ]


def rewritten(directory: Path, change: Callable[[dict[str, torch.Tensor]], object], file: int = 1) -> str:
    """Change the tensors of one file, and not the index; the name of the file."""
    path = sorted(directory.glob("*.safetensors"))[file]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return path.name


def test_tensors_of_a_wrong_shape_or_type_and_unknown_or_missing_ones_are_named(published: Path):
    name = "backbone.layers.0.mixer.D"
    index = json.loads((published / INDEX).read_bytes())
    file = index["weight_map"][name]
    number = sorted(path.name for path in published.glob("*.safetensors")).index(file)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(5)
        tensors["backbone.layers.0.mixer.A_log"] = torch.zeros(4, dtype=torch.float16)
        tensors["backbone.layers.9.norm.weight"] = torch.zeros(16)
        del tensors["backbone.layers.0.mixer.dt_bias"]

    rewritten(published, change, number)
    del index["weight_map"]["backbone.layers.0.mixer.dt_bias"]
    index["weight_map"]["backbone.layers.9.norm.weight"] = file
    (published / INDEX).write_text(json.dumps(index))
    assert refusal(published) == [
        "backbone.layers.0.mixer.A_log: of type F16; only F32 and BF16 are read",
        "backbone.layers.0.mixer.D: [5], and the model wants [4]",
        "backbone.layers.0.mixer.dt_bias: missing",
        "backbone.layers.9.norm.weight: not of this model",
    ]


def test_missing_truncated_and_doubled_files_are_named_at_once(published: Path):
    names = sorted(path.name for path in published.glob("*.safetensors"))
    count = sum(
        file == names[0] for file in json.loads((published / INDEX).read_bytes())["weight_map"].values()
    )
    (published / names[0]).unlink()
    whole = (published / names[1]).read_bytes()
    (published / names[1]).write_bytes(whole[:-100])
    (published / names[-1]).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
    )
    shutil.copyfile(published / names[2], published / f"copy_of_{names[2]}")
    lines = refusal(published)
    wrong = [names[0], f"copy_of_{names[2]}", names[1], names[-1]]
    assert [line.partition(": ")[0] for line in lines] == wrong
    assert lines[0].endswith(f"missing, with {count} tensors") and "damaged" in lines[2]
    assert lines[1].endswith(f"not in {INDEX}; is it another copy? move it away")
    assert lines[3].endswith(": a pointer of Git LFS and not the tensors; fetch the file with `git lfs pull`")


def test_a_tensor_in_two_files_and_one_that_the_index_invents_are_named(published: Path):
    name = rewritten(published, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(200, 16)}))
    index = json.loads((published / INDEX).read_bytes())
    index["weight_map"]["backbone.layers.7.norm.weight"] = name
    (published / INDEX).write_text(json.dumps(index))
    last = index["weight_map"]["lm_head.weight"]
    assert refusal(published) == [
        f"lm_head.weight: in {name}, and {INDEX} says {last}",
        f"backbone.layers.7.norm.weight: listed in {INDEX}, and not in {name}",
    ]


def test_an_index_that_names_files_elsewhere_is_refused(published: Path):
    """They would be no inputs of the job: a change of them would go unseen."""
    index = json.loads((published / INDEX).read_bytes())
    names = sorted(set(index["weight_map"].values()))
    outside = published.parent / "outside.safetensors"
    (published / names[0]).rename(outside)
    (published / names[1]).rename(published.parent / names[1])
    renamed = {names[0]: str(outside), names[1]: f"../{names[1]}", names[2]: "config.json"}
    index["weight_map"] = {name: renamed.get(file, file) for name, file in index["weight_map"].items()}
    (published / names[2]).unlink()
    (published / INDEX).write_text(json.dumps(index))
    assert refusal(published) == [
        f"{INDEX}: names {file!r}; only NAME.safetensors beside it is read"
        for file in (f"../{names[1]}", str(outside), "config.json")
    ]


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (None, f"neither {INDEX} nor model.safetensors is there"),
        ('{"weight_map": {}}', f"{INDEX}: not an index of safetensors (ValueError: it lists no tensors)"),
    ],
)
def test_what_is_wrong_with_files_is_said_and_not_that_each_tensor_is_missing(
    published: Path, index: str | None, said: str
):
    for path in published.glob("*.safetensors"):
        path.unlink()
    (published / INDEX).write_text(index) if index else (published / INDEX).unlink()
    assert refusal(published) == [said]


def test_numbers_that_are_not_finite_are_found_when_they_are_read(published: Path, tmp_path: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.view(-1)[0] = torch.inf

    spoiled = set(load_file(published / rewritten(published, spoil)))
    weights = published_weights(published, MODEL, TOKENS)
    (tmp_path / "imported").mkdir()
    torch_dist.write(tmp_path / "imported", weights.chunks, {})
    assert set(weights.not_finite) == spoiled


def test_a_checkpoint_of_megatron_of_another_model_is_refused(tmp_path: Path):
    directory = write(tmp_path / "made", values())
    other = MODEL.model_copy(update={"ffn_hidden_size": 32, "hybrid_layer_pattern": "ME*-M"})
    with pytest.raises(UserError) as refused:
        megatron_weights(directory, other, TOKENS)
    lines = str(refused.value).splitlines()
    assert lines[1] == "decoder.layers.3.mlp.linear_fc1.weight: [24, 16], and the model wants [32, 16]"
    assert "decoder.layers.4.mixer.A_log: missing" in lines


def test_files_of_a_checkpoint_of_megatron_that_are_missing_or_cut_are_named_at_once(tmp_path: Path):
    """By the list of its tensors: nothing of the files is read."""
    directory = write(tmp_path / "made", values())
    first, *_ = files = sorted(directory.glob("*.distcp"))
    size = first.stat().st_size
    os.truncate(first, 100)
    for other in files[1:]:
        other.unlink()
    with pytest.raises(UserError) as refused:
        megatron_weights(directory, MODEL, TOKENS)
    lines = str(refused.value).splitlines()[1:]
    assert lines[0].startswith(f"{first}: 100 bytes, where .metadata promises ")
    assert 100 < int(lines[0].rpartition(" ")[2]) <= size
    assert lines[1:] == [f"{other}: no such file" for other in files[1:]]


def test_the_list_of_a_checkpoint_of_megatron_is_read_without_torch_and_without_running_it(tmp_path: Path):
    found = values(dtype=torch.bfloat16)
    directory = write(tmp_path / "made", found)
    assert listed_tensors(directory) == {k: (tuple(t.shape), str(t.dtype)) for k, t in found.items()}
    (directory / ".metadata").write_bytes((directory / ".metadata").read_bytes()[:500])
    with pytest.raises(UserError, match="not the list of a torch_dist checkpoint, or damaged"):
        listed_tensors(directory)
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    (directory / ".metadata").write_bytes(evil)
    with pytest.raises(UserError):
        listed_tensors(directory)
    assert not (tmp_path / "ran").exists()


def test_an_import_does_not_run_what_the_list_of_a_checkpoint_of_megatron_names(tmp_path: Path):
    """A whole list, in which one value is a call."""

    class Call:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    directory = write(tmp_path / "made", values())
    listed = FileSystemReader(directory).read_metadata()
    (directory / ".metadata").write_bytes(pickle.dumps(replace(listed, planner_data=Call())))
    with pytest.raises(UserError, match=r"it names \w+\.system, which is none of its parts"):
        megatron_weights(directory, MODEL, TOKENS)
    assert not (tmp_path / "ran").exists()


def test_older_and_newer_spellings_of_a_configuration_are_the_same_model(tmp_path: Path):
    """Nemotron 3 Ultra lists its layers by kind; older files say attention_head_dim."""
    plain = config.published(
        MODEL, vocab_size=TOKENS, seq_length=64, dtype="float32", eos_token_id=0, pad_token_id=1
    )
    assert config.differences(plain, MODEL, TOKENS) == []
    kinds = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    written_out = plain | {
        "layers_block_type": [kinds[letter] for letter in plain.pop("hybrid_override_pattern")],
        "mtp_layers_block_type": ["full_attention", "moe"],
        "attention_head_dim": plain.pop("head_dim"),
    }
    for name in ("hybrid_override_pattern", "mtp_hybrid_override_pattern", "head_dim"):
        written_out.pop(name, None)
    assert config.differences(written_out, MODEL, TOKENS) == []


def test_a_base_is_loaded_in_another_layout_and_exported_from_it(tmp_path: Path):
    """Two processes share every layer and the experts; the export of what they save has the same bytes."""
    hf = export_of(write(tmp_path / "made", values()), tmp_path / "hf", shard_bytes=20_000)
    written(published_weights(hf, MODEL, TOKENS), tmp_path / "base/iter_0000000")
    (tmp_path / "base/latest_checkpointed_iteration.txt").write_text("0")
    sizes = json.dumps({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2})
    arguments = str(tmp_path / "base"), str(tmp_path / "saved"), sizes
    run_module("tests.unit.model.saved_layouts", *arguments, processes=2)
    found = tmp_path / "saved/iter_0000001"
    assert len(list(found.glob("*.distcp"))) == 2
    assert files(export_of(found, tmp_path / "again", shard_bytes=20_000)) == files(hf)

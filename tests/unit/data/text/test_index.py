"""The index of a blend is what megatron-core would build, of exactly as many samples, complete or absent."""

from __future__ import annotations

import json
import resource
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.data.text import index
from snaketron.data.text.blend import PretrainBlend, Shard, load_blend, weigh
from snaketron.data.tokenizer import Info
from snaketron.log import UserError
from snaketron.settings.blends import PhaseSettings
from snaketron.settings.training import IndexSettings

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset

SEQ_LENGTH = 4
SHA256 = "a" * 64
INFO = Info(sha256=SHA256, vocab_size=60000, eos_id=0, pad_id=1, eos_token="<e>")
NUMBERS = {"seed": 1, "seq_length": SEQ_LENGTH, "train_samples": 16}

Sizes = dict[str, list[int]]  # tokens of each shard of a corpus


def write_pair(prefix: Path, first: int, tokens: int) -> dict[str, Any]:
    """Documents of 1 to 5 tokens that count up from `first`; a shard as blend.json lists it."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = []
    while (rest := tokens - sum(lengths)) > 0:
        lengths.append(min(1 + len(lengths) % 5, rest))
    ends = np.cumsum(lengths, dtype=np.int64) * 2
    data = np.arange(first, first + tokens, dtype=np.uint16).tobytes()
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(lengths), len(lengths) + 1)
    arrays = (np.array(lengths, np.int32), ends - 2 * np.array(lengths), np.arange(len(lengths) + 1))
    idx = header + b"".join(a.tobytes() for a in arrays)
    Path(f"{prefix}.bin").write_bytes(data)
    Path(f"{prefix}.idx").write_bytes(idx)
    sizes = {"documents": len(lengths), "tokens": tokens, "bin_bytes": len(data), "idx_bytes": len(idx)}
    return {"prefix": str(prefix), "bin_sha256": "", "idx_sha256": "", **sizes}


@pytest.fixture
def make_blend(tmp_path: Path) -> Callable[..., Path]:
    """make_blend(weights, train={corpus: [tokens, ...]}, valid=..., test=...): the path of a blend.json.

    The tokens of all shards count up from 10, so that a token says where it comes from.
    """

    def make(weights: dict[str, float], **splits: Sizes) -> Path:
        first, content = 10, {}
        for split in ("train", "valid", "test"):
            shards = []
            for corpus, sizes in splits.get(split, {}).items():
                for i, tokens in enumerate(sizes):
                    prefix = tmp_path / "tokens" / corpus / split / f"s{i}"
                    shards.append(Shard(corpus=corpus, **write_pair(prefix, first, tokens)))
                    first += tokens
            used = {c: w for c, w in weights.items() if splits.get(split, {}).get(c)}
            content[split] = weigh(split, PhaseSettings(phase="one", weights=used, train_tokens=1000), shards)
        value = asdict(PretrainBlend("one", SHA256, "uint16", 1000, **content))
        files.write_json(tmp_path / "blend.json", value)
        return tmp_path / "blend.json"

    return make


def build(blend: Path, name: str = "index", **numbers: int) -> dict[str, Any]:
    output = blend.parent / name
    record = output.with_suffix(".json")
    return index.build(blend, IndexSettings(**{**NUMBERS, **numbers}), output=output, record=record).counts


def load(blend: Path, name: str = "index", tokenizer: Info = INFO, **numbers: int) -> dict[str, Any]:
    return index.load(blend.parent / name, blend, tokenizer, IndexSettings(**{**NUMBERS, **numbers}))


def samples(found: dict[str, Any], split: str) -> list[list[int]]:
    dataset, count = found[split]
    return [dataset[i]["tokens"].tolist() for i in range(count)]


# ------------------------------------------------------------------------------------------ content


def test_one_shard_is_read_once_in_an_epoch(make_blend):
    """41 tokens are 10 samples of 4 and the label after the last."""
    blend = make_blend({"docs": 1}, train={"docs": [41]})
    counts = build(blend, train_samples=10)
    assert counts["train"] == {"samples": 10, "corpora": {"docs": 10}}
    assert counts["valid"] is None and counts["test"] is None
    found = load(blend, train_samples=10)
    assert found.keys() == {"train"}
    tokens = [token for sample in samples(found, "train") for token in sample]
    assert len(tokens) == 40 and len(set(tokens)) == 40 and set(tokens) <= set(range(10, 51))


def test_samples_are_dealt_by_weight(make_blend):
    """docs has a weight of 1 and the tokens 10..89 in two shards; code has a weight of 3 and 90..169."""
    blend = make_blend({"docs": 1, "code": 3}, train={"docs": [40, 40], "code": [80]})
    counts = build(blend)
    assert counts["train"] == {"samples": 16, "corpora": {"docs": 4, "code": 12}}
    owners = Counter("docs" if sample[0] < 90 else "code" for sample in samples(load(blend), "train"))
    assert owners == {"docs": 4, "code": 12}


def test_held_out_splits_have_as_many_samples_as_their_tokens(make_blend):
    """30 tokens of valid are 7 samples of 4 with a label each; 3 of test are less than one sample."""
    blend = make_blend({"docs": 1}, train={"docs": [100]}, valid={"docs": [30]}, test={"docs": [3]})
    counts = build(blend)
    assert [counts[split]["samples"] for split in ("train", "valid", "test")] == [16, 7, 1]
    found = load(blend)
    assert [found[split][1] for split in ("train", "valid", "test")] == [16, 7, 1]
    assert len({token for sample in samples(found, "valid") for token in sample}) == 28
    assert set(samples(found, "test")[0]) == {140, 141, 142}  # repeated until the sample is full


def test_the_samples_are_those_of_megatrons_builder(make_blend, tmp_path: Path):
    """360 tokens are 90 samples, of which 50 are half an epoch of each shard."""
    blend = make_blend({"docs": 1, "code": 1}, train={"docs": [90, 70], "code": [200]})
    build(blend, train_samples=50)
    tokenizer = index._Tokenizer(SHA256, INFO)
    config = index._config(load_blend(blend), IndexSettings(**NUMBERS), tmp_path / "theirs", tokenizer)
    theirs, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [50, 0, 0], lambda: True, config).build()
    ours, _ = load(blend, train_samples=50)["train"]
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        expected = [theirs[i][key].tolist() for i in range(50)]
        assert [ours[i][key].tolist() for i in range(50)] == expected


@pytest.mark.parametrize("more", [50, 90, 91, 170, 400])
def test_more_samples_begin_with_the_same_ones(make_blend, more: int):
    """From a third of an epoch on, up to over four: what was seen is seen again, token for token."""
    blend = make_blend({"docs": 1, "code": 1}, train={"docs": [90, 70], "code": [200]})
    build(blend, train_samples=30)
    build(blend, "longer", train_samples=more)
    short = samples(load(blend, train_samples=30), "train")
    long = samples(load(blend, "longer", train_samples=more), "train")
    assert len(long) == more and long[:30] == short


@pytest.mark.parametrize(
    ("seq_length", "seed", "least", "most"), [(4, 1, 1, 1), (8, 1, 0, 0.2), (4, 2, 0, 0.2)]
)
def test_a_phase_of_another_seed_or_length_reads_other_samples(make_blend, seq_length, seed, least, most):
    """A tenth of the text each; what both read by chance alone is a tenth of that."""
    blend = make_blend({"docs": 1}, train={"docs": [40_001]})
    numbers = {"train_samples": 4000 // seq_length, "seq_length": seq_length, "seed": seed}
    build(blend, train_samples=1000)
    build(blend, "later", **numbers)
    first = samples(load(blend, train_samples=1000), "train")
    later = samples(load(blend, "later", **numbers), "train")
    seen, read = ([token for sample in found for token in sample] for found in (first, later))
    assert len(seen) == len(read) == 4000
    assert least <= len(set(seen) & set(read)) / 4000 <= most


def test_each_epoch_is_every_token_in_an_order_of_its_own(make_blend):
    """41 tokens are 10 samples of 4 and a label, 82 are 20 and 123 are 30: a sample may lie in two epochs."""
    blend = make_blend({"docs": 1}, train={"docs": [41]})
    build(blend, train_samples=30)
    found = samples(load(blend, train_samples=30), "train")
    parts = [found[:10], found[10:20], found[20:]]
    for times in (1, 2):
        seen = Counter(token for sample in found[: 10 * times] for token in sample)
        assert max(seen.values()) == times and sum(seen.values()) == 40 * times
    assert sorted(parts[0]) != sorted(parts[1]) != sorted(parts[2])


def test_a_large_shard_among_many_small_ones_is_not_asked_for_too_much(make_blend, tmp_path: Path):
    """A shard of 240 tokens, 59 samples, weighs as much as 300 others.

    Half of 100 samples are of it; but megatron-core's builder, which takes at least one sample of each shard,
    wants half of 350.
    """
    small = {f"c{i}": [20] for i in range(300)}
    blend = make_blend({"big": 300} | dict.fromkeys(small, 1.0), train={"big": [240]} | small)
    counts = build(blend, train_samples=100)
    assert counts["train"]["samples"] == 100 and counts["train"]["corpora"]["big"] == 50
    tokenizer = index._Tokenizer(SHA256, INFO)
    config = index._config(load_blend(blend), IndexSettings(**NUMBERS), tmp_path / "theirs", tokenizer)
    with pytest.raises(IndexError, match="oversamples"):
        BlendedMegatronDatasetBuilder(GPTDataset, [100, 0, 0], lambda: True, config).build()


def test_a_corpus_that_is_too_small_is_repeated(make_blend):
    """20 tokens are 4 samples an epoch; half of 16 samples are of it."""
    blend = make_blend({"docs": 1, "code": 1}, train={"docs": [20], "code": [200]})
    assert build(blend)["train"]["corpora"] == {"docs": 8, "code": 8}
    seen = Counter(token for sample in samples(load(blend), "train") for token in sample if token < 30)
    assert sum(seen.values()) == 32 and len(seen) == 20 and max(seen.values()) == 2


# --------------------------------------------------------------------------------------- on the disk


def test_the_same_blend_gives_the_same_bytes(make_blend, tmp_path: Path):
    blend = make_blend({"docs": 1, "code": 3}, train={"docs": [40, 40], "code": [80]})
    build(blend)
    build(blend, "again")
    first, second = (files.read_json(tmp_path / name)["outputs"][0] for name in ("index.json", "again.json"))
    assert first["sha256"] == second["sha256"] and first["bytes"] == second["bytes"] > 0
    assert first["path"] == str(tmp_path / "index")
    build(blend, "other", seed=2)
    assert files.read_json(tmp_path / "other.json")["outputs"][0]["sha256"] != first["sha256"]


def test_the_record_says_what_the_index_follows_from(make_blend, tmp_path: Path):
    blend = make_blend({"docs": 1, "code": 3}, train={"docs": [40, 40], "code": [80]})
    build(blend)
    record = files.read_json(tmp_path / "index.json")
    assert (record["kind"], record["name"]) == ("index", "one")
    assert record["settings"] == {"blend": files.sha256(blend), **NUMBERS}
    assert record["inputs"] == [{"name": "blend", "path": str(blend), "sha256": files.sha256(blend)}]
    # 4 files of each of three shards, and 3 of their blend.
    assert record["counts"]["files"] == 15 == len(list((tmp_path / "index").iterdir()))


def test_the_index_is_complete_or_absent(make_blend, tmp_path: Path):
    """A killed job leaves a part under another name, which the next one replaces."""
    leftover = files.partial(tmp_path / "index")
    leftover.mkdir()
    (leftover / "half.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "old.npy").write_bytes(b"\x93NUMPY")
    blend = make_blend({"docs": 1}, train={"docs": [100]})
    build(blend)
    assert not leftover.exists()
    assert not [p for p in (tmp_path / "index").iterdir() if p.name in ("half.npy", "old.npy")]


def test_nothing_is_left_of_a_failure(make_blend, tmp_path: Path):
    blend = make_blend({"docs": 1}, train={"docs": [100]})
    (tmp_path / "tokens/docs/train/s0.bin").unlink()
    with pytest.raises(UserError, match=r"s0.bin: no such file"):
        build(blend)
    with pytest.raises(ValueError):
        make_blend({"docs": 1}, train={"docs": [100]})
        build(blend, seed=-1)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".index", "index"))]


def test_a_full_disk_is_said_and_nothing_is_left(make_blend, tmp_path: Path):
    """numpy says how much it wrote of an array, and no error of the system."""
    blend = make_blend({"a": 1}, train={"a": [4000]})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(
            UserError, match=r"cannot write .*/index: \d+ requested and \d+ written; free some"
        ):
            build(blend)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*index*"))


def test_reading_writes_nothing_and_opens_a_shard_when_it_is_read(make_blend, tmp_path: Path):
    blend = make_blend({"docs": 1, "code": 3}, train={"docs": [40, 40], "code": [80]})
    build(blend)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "index").iterdir())
    dataset, _ = load(blend)["train"]
    texts = [shard.dataset for shard in dataset.datasets]
    assert not any("opened" in vars(text) for text in texts)
    dataset[0]
    assert sum("opened" in vars(text) for text in texts) == 1
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "index").iterdir()) == before


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"seed": 2}, "made with seed 1, not 2; run rule index_pretrain again"),
        ({"seq_length": 8}, "made with seq_length 4, not 8"),
        ({"train_samples": 17}, "made with train_samples 16, not 17"),
    ],
)
def test_an_index_of_another_training_is_refused(make_blend, numbers, message):
    blend = make_blend({"docs": 1}, train={"docs": [100]})
    build(blend)
    with pytest.raises(UserError, match=message):
        load(blend, **numbers)


def test_an_index_of_another_blend_is_refused(make_blend):
    blend = make_blend({"docs": 1}, train={"docs": [100]})
    build(blend)
    before = files.sha256(blend)
    make_blend({"docs": 1}, train={"docs": [101]})
    with pytest.raises(UserError, match=f"made with blend {before}, not {files.sha256(blend)}"):
        load(blend)


def test_an_index_of_another_megatron_is_refused(make_blend, tmp_path: Path):
    blend = make_blend({"docs": 1}, train={"docs": [100]})
    build(blend)
    record = files.read_json(tmp_path / "index.json")
    record["versions"]["megatron-core"] = "0.1"
    files.write_json(tmp_path / "index.json", record)
    with pytest.raises(UserError, match=r"made with megatron-core 0\.1, not 0\."):
        load(blend)


def test_an_index_that_is_not_there_is_named(make_blend, tmp_path: Path):
    blend = make_blend({"docs": 1}, train={"docs": [100]})
    with pytest.raises(UserError, match=r"index.json: no such record; the rule that makes it"):
        load(blend)
    build(blend)
    (tmp_path / "index").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"index: no such directory; run rule index_pretrain"):
        load(blend)


def test_a_blend_of_another_tokenizer_is_refused(make_blend):
    blend = make_blend({"docs": 1}, train={"docs": [100]})
    build(blend)
    other = Info(**{**vars(INFO), "sha256": "b" * 64})
    with pytest.raises(UserError, match=r"another tokenizer \(sha256 aaaaaaaaaaaa, and bbbbbbbbbbbb"):
        load(blend, tokenizer=other)


def test_more_shards_than_a_process_may_open_are_refused():
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        pytest.skip("this machine has no limit")
    index._allow_open_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limit, limit)
    with pytest.raises(UserError, match=f"{limit} shards are in train.* where a process may have {limit}"):
        index._allow_open_files(limit)


# -------------------------------------------------------------------------------------------- script


def test_the_script_says_what_it_takes_of_each_corpus(make_blend, run_script, tmp_path: Path, caplog):
    caplog.set_level("INFO")
    blend = make_blend({"docs": 1, "code": 3}, train={"docs": [40, 40], "code": [80]})
    status, stderr = run_script(
        "index_pretrain",
        *("--blend", blend, "--settings", IndexSettings(**NUMBERS).model_dump_json()),
        *("--output", tmp_path / "index", "--record", tmp_path / "index.json"),
    )
    assert status == 0, stderr
    assert "train: 16 samples; docs 25.00%, code 75.00%" in caplog.text and "valid: no tokens" in caplog.text
    assert json.loads((tmp_path / "index.json").read_text())["counts"]["train"]["corpora"]["docs"] == 4

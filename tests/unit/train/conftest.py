"""One process that plays every rank, a small model, and a small blend of tokenized text."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import load
from snaketron.data import tokenizer
from snaketron.data.chats.packs import join, write
from snaketron.data.text import blend
from snaketron.data.text.tokenize import tokenize_shard
from snaketron.files import write_json
from snaketron.jobs.version import Version
from snaketron.lineage.record import Entry, making
from snaketron.log import logger
from snaketron.model import lora
from snaketron.model.build import BuiltModel, build_model
from snaketron.model.checkpoint import Saver
from snaketron.settings.blends import PhaseSettings
from snaketron.settings.text import TokenizeSettings
from snaketron.settings.tokenizer import TokenizerSettings
from snaketron.settings.training import RunSettings, TrainSettings, run_settings, train_settings
from tests.unit.model.conftest import one_process, seeded  # noqa: F401

import numpy as np
import pytest
import torch
import yaml

MODEL = {
    "hybrid_layer_pattern": "ME*",
    "hidden_size": 32,
    "kv_channels": 8,
    "num_attention_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "mtp_num_layers": 1,
    "mtp_hybrid_layer_pattern": "*E",
    "init_method_std": 0.02,
}


@pytest.fixture(autouse=True)
def garbage():
    """megatron-core collects garbage twice a save: for a quarter of the time, among what other tests left."""
    gc.freeze()


@pytest.fixture(autouse=True)
def log_handlers():
    """A stage logs into its version; not for longer than its test."""
    before, level = list(logger.handlers), logger.level
    yield
    for handler in logger.handlers[:]:
        if handler not in before:
            logger.removeHandler(handler)
            handler.close()
    logger.setLevel(level)


@pytest.fixture
def settings() -> Callable[..., tuple[TrainSettings, RunSettings]]:
    """settings(tokens=..., **keys of pretrain) of a phase of 4 sequences of 16 tokens a step."""

    def make(
        tokens: int = 320, model: dict | None = None, seed: int = 1234, **keys
    ) -> tuple[TrainSettings, RunSettings]:
        phase = {"name": "one", "tokens": tokens, "blend": [{"corpus": "docs", "weight": 1}]}
        pretrain = {"seq_length": 16, "global_batch_size": 4, "micro_batch_size": 2, "cpus_per_task": 1}
        pretrain |= {"warmup_tokens": 0, "decay_tokens": 64, "phases": [phase]} | keys
        config = load({"seed": seed, "model": MODEL | (model or {}), "pretrain": pretrain}, {})
        return train_settings(config, "pretrain/one"), run_settings(config, "pretrain/one")

    return make


@pytest.fixture
def sft_settings() -> Callable[..., tuple[TrainSettings, RunSettings]]:
    """sft_settings(model, pack_size, **keys of sft) of 4 steps of 4 packs of 16 tokens."""

    def make(
        model: dict | None = None, pack_size: int = 16, seed: int = 1234, **keys
    ) -> tuple[TrainSettings, RunSettings]:
        sft = {"train_iters": 4, "global_batch_size": 4, "warmup_iters": 0, "cpus_per_task": 1} | keys
        data = {"pack_size": pack_size}
        config = load({"seed": seed, "model": MODEL | (model or {}), "sft": sft, "sft_data": data}, {})
        return train_settings(config, "sft"), run_settings(config, "sft")

    return make


@pytest.fixture
def packed_blend(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Path]:
    """packed_blend(train={source: packs}, ...) writes packs of conversations and their blend.

    A conversation is a list of (id, whether the assistant said it). Every source weighs the same.
    """

    def make(
        pack_size: int = 16, padding_multiple: int = 1, **splits: dict[str, list[list[list[tuple[int, int]]]]]
    ) -> Path:
        made = {
            "tokenizer_sha256": tokenizer.tokenizer_info(tokenizer_dir).sha256,
            "template_sha256": "t",
            "pack_size": pack_size,
            "padding_multiple": padding_multiple,
        }
        listed: dict[str, list] = {split: [] for split in ("train", "valid", "test")}
        for split, sources in splits.items():
            for name, packs in sources.items():
                path = tmp_path / f"{split}_{name}.parquet"
                arrays = [[tuple(np.array(c, dtype=np.int32).T) for c in pack] for pack in packs]
                write(path, [join(conversations) for conversations in arrays], made)
                file = {"path": str(path), "bytes": path.stat().st_size}
                source = {"source": name, "weight": 1 / len(sources), "template_sha256": "t"}
                listed[split].append(source | {"files": [file]})
        write_json(tmp_path / "blend.json", made | {"splits": listed})
        return tmp_path / "blend.json"

    return make


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    text = directory / "text.jsonl"
    text.write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 5)
    tokenizer.build(
        [text],
        settings=TokenizerSettings(vocab_size=300, text_field="text"),
        output=directory / "tokenizer.json",
        record=directory / "record.json",
    )
    return directory


@pytest.fixture(scope="session")
def blend_path(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A blend of 60 documents, none of them in the test split."""
    root = tmp_path_factory.mktemp("blend")
    text = root / "part.jsonl"
    rows = [
        {"text": f"document {i} of the quick brown fox {'and the lazy dog ' * (i % 7)}"} for i in range(60)
    ]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenize_shard(
        [text],
        settings=TokenizeSettings(corpus="docs", text_field="text", valid_fraction=0.2, test_fraction=0.0),
        tokenizer=tokenizer_dir,
        bins={split: root / split / "part.bin" for split in ("train", "valid", "test")},
        table=root / "part.parquet",
        record=root / "part.json",
    )
    blend.build(
        PhaseSettings(phase="one", weights={"docs": 1.0}, train_tokens=320),
        max_epochs=4,
        records=[root / "part.json"],
        tokenizer=tokenizer_dir,
        output=root / "blend.json",
        record=root / "record.json",
    )
    return root / "blend.json"


@pytest.fixture
def blend_of(tmp_path: Path, tokenizer_dir: Path) -> Callable[..., Path]:
    """A blend of one or two corpora of equal weight: the first with 40 documents, the second with 6."""

    def make(*names: str, valid_fraction: float = 0.0, **splits: str) -> Path:
        for name, count in zip(names, (40, 6), strict=False):
            raw = tmp_path / f"{name}.jsonl"
            raw.write_text(
                "".join(f'{{"text": "{name} {i} {"the lazy dog " * (i % 9)}"}}\n' for i in range(count))
            )
            tokenize_shard(
                [raw],
                settings=TokenizeSettings(
                    corpus=name,
                    text_field="text",
                    valid_fraction=valid_fraction,
                    test_fraction=0.0,
                    split=splits.get(name),
                ),
                tokenizer=tokenizer_dir,
                bins={split: tmp_path / split / f"{name}.bin" for split in ("train", "valid", "test")},
                table=tmp_path / f"{name}.parquet",
                record=tmp_path / f"{name}.json",
            )
        blend.build(
            PhaseSettings(phase="one", weights=dict.fromkeys(names, 1.0), splits=splits, train_tokens=1440),
            max_epochs=100,
            records=[tmp_path / f"{name}.json" for name in names],
            tokenizer=tokenizer_dir,
            output=tmp_path / "blend.json",
            record=tmp_path / "record.json",
        )
        return tmp_path / "blend.json"

    return make


@pytest.fixture
def publish(tmp_path: Path, tokenizer_dir: Path, settings):
    """publish(stage, key, settings=None, base=None) saves a new model as a finished version below ckpt."""
    run: RunSettings = settings()[1]

    def make(
        stage: str, key: str, values: TrainSettings | None = None, base: Path | None = None
    ) -> BuiltModel:
        values = (values or settings(seed=int(key, 16))[0]).model_copy(update={"stage": stage})
        built = build_model(values, run, tokenizer.tokenizer_info(tokenizer_dir).vocab_size)
        for _, adapter in lora.adapted(built.model):
            torch.nn.init.normal_(adapter.b, std=0.1)
        version = Version.of(tmp_path / "ckpt" / stage, stage, key)
        saver = Saver.configured(run)
        saver.save(version.directory, 1, built.trained, None, {"iteration": 1})
        saver.finish()
        version.config.write_text(yaml.safe_dump({"settings": values.model_dump()}))
        shutil.copytree(tokenizer_dir, version.tokenizer)
        with making("checkpoint", stage, outputs={}, record=version.record) as job:
            job.key, job.settings = key, values.model_dump()
            job.inputs = {"base": Entry("base", str(base), version=Version(base).identity)} if base else {}
        version.publish(tmp_path / "ckpt" / stage)
        return built

    return make

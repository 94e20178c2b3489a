"""A model from the path of a checkpoint, without its training."""

from __future__ import annotations

import shutil
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters
from snaketron.inference.opening import open_checkpoint
from snaketron.log import UserError
from snaketron.model.build import BuiltModel
from snaketron.settings.training import LoraSettings

import pytest
import torch
import yaml

IDS = torch.arange(3, 15)[None]


def logits(built: BuiltModel) -> torch.Tensor:
    with built.evaluating():
        return built.module(IDS, torch.arange(IDS.shape[1])[None], None)


def test_the_model_that_was_saved_is_opened_by_its_path(publish, tmp_path: Path):
    saved = publish("pretrain/one", "0a")
    torch.manual_seed(99)
    opened = open_checkpoint(tmp_path / "ckpt/pretrain/one")
    assert torch.equal(logits(opened), logits(saved))
    assert (opened.settings, opened.vocab_size) == (saved.settings, saved.vocab_size)


def test_what_was_trained_in_fp8_is_opened_in_bf16_on_any_machine(publish, settings, tmp_path: Path):
    saved = publish("pretrain/one", "0a", settings(model={"precision": "bf16"})[0])
    path = tmp_path / "ckpt/pretrain/one/config.yaml"
    config = yaml.safe_load(path.read_text())
    for precision in ("fp8_delayed", "nvfp4"):
        config["settings"]["model"]["precision"] = precision
        path.write_text(yaml.safe_dump(config))
        opened = open_checkpoint(tmp_path / "ckpt/pretrain/one")
        assert opened.settings.model.precision == "bf16"
        assert torch.equal(logits(opened), logits(saved))


def test_adapters_are_opened_with_the_base_that_they_were_trained_on(publish, settings, tmp_path: Path):
    base = publish("pretrain/one", "0a")
    adapters = Adapters(target_modules=["linear_*"], rank=2)
    values = LoraSettings(**settings(seed=3)[0].model_dump(), lora=adapters)
    tuned = publish("lora", "0b", values, tmp_path / "ckpt/pretrain/one")
    publish("pretrain/one", "0c")  # where the link leads now is another model
    opened = open_checkpoint(tmp_path / "ckpt/lora")
    assert not torch.equal(logits(opened), logits(base))
    tuned.load_base(tmp_path / "ckpt/versions/pretrain_one-0a")
    assert torch.equal(logits(opened), logits(tuned))
    shutil.rmtree(tmp_path / "ckpt/versions/pretrain_one-0a")
    with pytest.raises(UserError, match=r"adapters of .*pretrain_one-0a, which is not there any more"):
        open_checkpoint(tmp_path / "ckpt/lora")


def test_a_merged_checkpoint_is_opened_as_a_whole_model(publish, settings, tmp_path: Path):
    """Its settings still name the adapters, which it has not any more."""
    saved = publish("lora_merged", "0d")
    path = tmp_path / "ckpt/lora_merged"
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["settings"]["lora"] = Adapters().model_dump()
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    opened = open_checkpoint(path)
    assert opened.adapters is None and torch.equal(logits(opened), logits(saved))


def test_what_is_no_finished_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not a finished checkpoint of this workflow"):
        open_checkpoint(tmp_path)

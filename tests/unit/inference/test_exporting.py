"""What an export of a finished checkpoint refuses, before anything is written."""

from __future__ import annotations

from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.huggingface.config import read_config
from snaketron.inference.exporting import export_checkpoint
from snaketron.log import UserError

import pytest


def test_an_export_takes_the_place_of_an_export_and_of_nothing_else(publish, tmp_path: Path):
    publish("pretrain/one", "0a")
    path, output = tmp_path / "ckpt/pretrain/one", tmp_path / "hf/one"
    output.mkdir(parents=True)
    export_checkpoint(path, output)  # an empty directory
    export_checkpoint(path, output)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    for other in (mine, mine / "notes.txt", path):
        with pytest.raises(UserError, match=f"{other} is there and no export, so it is not replaced"):
            export_checkpoint(path, other)
    assert (mine / "notes.txt").read_text() == "keep" and not list(mine.glob(".*"))


def test_a_finished_checkpoint_that_lost_its_last_step_is_not_exported_as_an_earlier_one(
    publish, tmp_path: Path
):
    publish("pretrain/one", "0a")
    path = tmp_path / "ckpt/pretrain/one"
    (path / "iter_0000001").rename(path / "iter_0000000")
    with pytest.raises(
        UserError, match=r"not a finished checkpoint .* \(its iter_0000001 is not there any more"
    ):
        export_checkpoint(path, tmp_path / "hf/one")
    (path / "iter_0000000").rename(path / "iter_0000001")
    (path / "config.yaml").write_text("[")
    with pytest.raises(UserError, match=r"config\.yaml: not the configuration of a checkpoint"):
        export_checkpoint(path, tmp_path / "hf/one")
    (path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml: no such file; the checkpoint is damaged"):
        export_checkpoint(path, tmp_path / "hf/one")
    assert not (tmp_path / "hf").exists()


def test_a_link_is_not_replaced_by_an_export(publish, tmp_path: Path):
    """Where it leads to may be another disk, for which a model has no room here."""
    publish("pretrain/one", "0a")
    (tmp_path / "large").mkdir()
    for name in ("large", "nowhere"):
        link = tmp_path / f"hf_{name}"
        link.symlink_to(name)
        with pytest.raises(UserError, match=rf"hf_{name} is a link to {name}; name that directory"):
            export_checkpoint(tmp_path / "ckpt/pretrain/one", link)
        assert link.is_symlink()
    assert not list(tmp_path.glob(".hf*")) and not list((tmp_path / "large").iterdir())


def test_a_model_that_was_tuned_on_short_packs_still_says_how_long_a_text_it_has_seen(
    publish, settings, tmp_path: Path
):
    """vLLM refuses sequences longer than max_position_embeddings."""
    publish("pretrain/one", "0a", settings(seq_length=96)[0])
    publish("pretrain/two", "0b", settings(seq_length=64)[0], base=tmp_path / "ckpt/pretrain/one")
    publish("sft", "0c", settings(seq_length=32)[0], base=tmp_path / "ckpt/pretrain/two")
    for stage in ("pretrain/two", "sft"):
        output = tmp_path / "hf" / stage
        export_checkpoint(tmp_path / "ckpt" / stage, output)
        assert read_config(output)["max_position_embeddings"] == 96

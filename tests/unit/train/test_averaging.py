"""The average of checkpoints in place of a decay, against one worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import merge_checkpoints
import snaketron.model  # noqa: F401  before megatron
from snaketron.data import tokenizer
from snaketron.inference.exporting import export_checkpoint
from snaketron.inference.opening import open_checkpoint
from snaketron.jobs.version import Version
from snaketron.lineage.record import making
from snaketron.log import UserError
from snaketron.model.build import build_model
from snaketron.model.checkpoint import Saver
from snaketron.train import averaging
from snaketron.train.averaging import average, coefficients

import pytest
import torch
import yaml


def test_the_coefficients_are_those_of_a_decay_by_one_minus_a_root():
    """The area below 1 - sqrt(d) up to x is x - 2/3 sqrt(x)^3: 1/3 up to 1, and 0.264298 up to 1/2.

    So the first half has a mean of 0.528595 and the second one of 0.138071.
    """
    assert coefficients([10, 20]) == pytest.approx([2 / 3, 1 / 3])
    assert coefficients([10, 20, 30]) == pytest.approx([0.471405, 0.390524, 0.138071], abs=1e-6)
    # After a quarter of the way the area is 1/4 - 1/12 = 1/6: means of 2/3 and of (1/3 - 1/6) / (3/4) = 2/9.
    assert coefficients([0, 10, 40]) == pytest.approx([1 / 3, 4 / 9, 2 / 9])
    assert sum(coefficients([3, 4, 6, 9, 20, 21])) == pytest.approx(1)


@pytest.fixture
def phase(tmp_path: Path, tokenizer_dir: Path, settings):
    """A finished phase of 10 steps, whose rate falls after 8, and its models after steps 2, 6, 8 and 10."""
    values, run = settings(tokens=640, decay_tokens=128, keep_checkpoints=9)
    version = Version.of(tmp_path / "ckpt/pretrain/one", "pretrain/one", "a")
    values = values.model_copy(update={"stage": "pretrain/one"})
    saver, models = Saver.configured(run), {}
    for iteration in (2, 6, 8, 10):
        vocab_size = tokenizer.tokenizer_info(tokenizer_dir).vocab_size
        seeded = values.model_copy(update={"seed": iteration})
        models[iteration] = build_model(seeded, run, vocab_size).model
        saver.save(version.directory, iteration, models[iteration], None, {"iteration": iteration})
    saver.finish()
    sha256 = tokenizer.tokenizer_info(tokenizer_dir).sha256
    version.config.write_text(yaml.safe_dump({"settings": values.model_dump(), "tokenizer_sha256": sha256}))
    shutil.copytree(tokenizer_dir, version.tokenizer)
    with making("checkpoint", "pretrain/one", outputs={}, record=version.record) as job:
        job.key = "a"
    version.publish(tmp_path / "ckpt/pretrain/one")
    return models


@pytest.mark.parametrize(
    ("tokens", "iterations", "weights"),
    [
        (0, [2, 6, 8], None),
        (2 * 64, [6, 8], [2 / 3, 1 / 3]),
    ],
)
def test_an_average_is_that_of_each_number_by_hand(phase, tmp_path: Path, tokens, iterations, weights):
    """After step 10 the rate has fallen, so that checkpoint is not part of it."""
    output = tmp_path / "ckpt/merged/one"
    arguments = ["--checkpoint", tmp_path / "ckpt/pretrain/one", "--stage", "merged/one"]
    arguments += ["--tokens", tokens, "--output", output]
    assert merge_checkpoints.main([str(argument) for argument in arguments]) == 0
    record = json.loads((output / "record.json").read_text())
    assert list(record["counts"]["averaged"]) == [str(i) for i in iterations]
    weights = weights or coefficients(iterations)
    found = open_checkpoint(output).model.state_dict()
    parts = [phase[iteration].state_dict() for iteration in iterations]
    tensors = [key for key, value in found.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 20
    for key in tensors:
        expected = sum(weight * part[key].double() for weight, part in zip(weights, parts, strict=True))
        assert torch.allclose(found[key].double(), expected, atol=1e-6), key
    # It is published, found again, and exported like the end of a phase.
    assert output.resolve().name == f"merged_one-{record['key']}"
    average(tmp_path / "ckpt/pretrain/one", output, stage="merged/one", tokens=tokens or None)
    assert export_checkpoint(output, tmp_path / "hf").inputs[0].version == Version(output).identity


def test_one_checkpoint_is_no_average(phase, tmp_path: Path):
    with pytest.raises(UserError, match="1 checkpoint to average of the 8 steps before its learning rate"):
        average(tmp_path / "ckpt/pretrain/one", tmp_path / "ckpt/merged/one", stage="merged/one", tokens=64)
    assert not (tmp_path / "ckpt/merged").exists()


def test_a_damaged_checkpoint_is_named_and_no_average_is_published(phase, tmp_path: Path):
    """One whose bytes a full disk left as zeros, and then one that has lost what describes it."""
    damaged = Version((tmp_path / "ckpt/pretrain/one").resolve()).iteration_directory(6)
    for data in damaged.glob("*.distcp"):
        data.write_bytes(bytes(data.stat().st_size))
    source, output = tmp_path / "ckpt/pretrain/one", tmp_path / "ckpt/merged/one"
    with pytest.raises(UserError, match=r"iter_0000006: .* cannot be read"):
        average(source, output, stage="merged/one", tokens=None)
    (damaged / ".metadata").unlink()
    with pytest.raises(UserError, match="iter_0000006: not a torch_dist checkpoint, or damaged"):
        average(source, output, stage="merged/one", tokens=None)
    assert [path.name for path in output.parent.iterdir()] == [".one.asked"]


def test_an_average_that_outlived_its_run_does_not_replace_a_later_one(
    phase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While it writes, a second run makes one of other checkpoints."""
    source, output = tmp_path / "ckpt/pretrain/one", tmp_path / "ckpt/merged/one"
    with monkeypatch.context() as outlived:

        def write(*arguments):
            outlived.undo()
            average(source, output, stage="merged/one", tokens=2 * 64)
            averaging._write(*arguments)

        outlived.setattr(averaging, "_write", write)
        with pytest.raises(UserError, match="a run has asked for merged_one-"):
            average(source, output, stage="merged/one", tokens=None)
    assert [*json.loads((output / "record.json").read_text())["counts"]["averaged"]] == ["6", "8"]

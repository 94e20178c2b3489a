"""What a training checks before it begins, and the version that it works in."""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron import files
from snaketron.jobs.heartbeat import Heartbeat
from snaketron.jobs.version import version_key
from snaketron.log import UserError, logger
from snaketron.train.stage import Stage, run_stage, training_parser
from tests.records import record

import pytest
import yaml


@pytest.fixture
def args(tmp_path: Path, tokenizer_dir: Path, blend_path: Path, settings):
    """args(base=..., **settings): the command line of a stage that is published below tmp_path/ckpt."""

    def make(base: Path | None = None, blend: Path | str = blend_path, text: str = "", **keys) -> Namespace:
        train, run = settings(**keys)
        argv = ["--blend", blend, "--tokenizer", tokenizer_dir, "--output", tmp_path / "ckpt/pretrain/one"]
        argv += ["--settings", text or train.model_dump_json(), "--run-settings", run.model_dump_json()]
        argv += ["--log-file", tmp_path / "logs/one.log", "--base", *([base] if base else [])]
        return training_parser(None).parse_args([str(a) for a in argv])

    return make


@pytest.fixture
def stage(args):
    """stage(base=..., **settings): that stage."""
    return lambda *arguments, **keys: Stage.from_args(args(*arguments, **keys))


@pytest.fixture
def base(tmp_path: Path, tokenizer_dir: Path, settings) -> Path:
    """What a stage reads of the checkpoint that it starts from."""
    directory = tmp_path / "ckpt/pretrain/zero"
    files.write_json(directory / "record.json", record("checkpoint", "pretrain/zero", key="abc"))
    config = {
        "settings": settings()[0].model_dump(),
        "tokenizer_sha256": files.sha256(tokenizer_dir / "tokenizer.json"),
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def test_the_version_is_that_of_the_settings_and_inputs(
    stage, tmp_path: Path, blend_path: Path, tokenizer_dir
):
    one = stage()
    identities = [files.sha256(blend_path), files.sha256(tokenizer_dir / "tokenizer.json")]
    key = version_key(one.settings.model_dump(), identities)
    assert one.version.directory == tmp_path / f"ckpt/versions/pretrain_one-{key}"
    assert not one.version.is_finished and not one.output.exists()


def test_how_it_is_run_leaves_the_version_alone(stage):
    one = stage()
    assert stage(log_interval=3, keep_checkpoints=9, cpus_per_task=2, micro_batch_size=4).key == one.key


def test_what_is_trained_is_another_version(stage, base: Path):
    keys = [stage().key, stage(tokens=640).key, stage(seed=5).key, stage(base=base).key]
    assert len(set(keys)) == 4


def test_a_base_of_another_model_is_refused_with_every_key_that_differs(stage, base: Path, tmp_path: Path):
    with pytest.raises(UserError) as error:
        stage(base=base, model={"hidden_size": 64, "mtp_num_layers": 2})
    assert str(error.value).splitlines() == [
        f"{base} is a checkpoint of another model:",
        "model.hidden_size: 32 in the checkpoint, 64 in the configuration",
        "model.mtp_num_layers: 1 in the checkpoint, 2 in the configuration",
    ]
    assert not (tmp_path / "ckpt/versions").exists()


def test_a_key_that_no_weight_depends_on_may_differ(stage, base: Path):
    model = {"moe_aux_loss_coeff": 0.5, "mtp_loss_scaling_factor": 0.1, "init_method_std": 0.1}
    assert stage(base=base, model=model | {"precision": "bf16"}).inputs[-1].version == "pretrain/zero-abc"


def test_a_base_with_another_tokenizer_is_refused(stage, base: Path):
    config = yaml.safe_load((base / "config.yaml").read_text())
    (base / "config.yaml").write_text(yaml.safe_dump(config | {"tokenizer_sha256": "f" * 64}))
    with pytest.raises(
        UserError, match=r"the tokenizer: sha256 ffffffffffff in the checkpoint, [0-9a-f]{12} here"
    ):
        stage(base=base)


def test_a_base_that_is_not_finished_is_refused(stage, base: Path):
    (base / "record.json").unlink()
    with pytest.raises(UserError, match=f"{base}: not a finished checkpoint of this workflow"):
        stage(base=base)


def test_a_missing_blend_is_named(stage):
    with pytest.raises(UserError, match=r"^no/blend.json: no such file$"):
        stage(blend="no/blend.json")


def test_a_finished_version_is_published_without_training(args, stage, tmp_path: Path):
    version = stage().version
    files.write_json(version.record, {})
    assert run_stage(args(), lambda stage: pytest.fail("it trained")) == 0
    assert (tmp_path / "ckpt/pretrain/one").resolve() == version.directory


def test_the_record_says_what_all_attempts_cost(stage, tmp_path: Path):
    one = stage(cpus_per_task=3)
    version = one.version
    (version.iteration_directory(one.settings.train_iters)).mkdir(parents=True)
    attempts = [{"seconds": 1000.0, "outcome": "failed"}, {"outcome": None}, {"outcome": None}]
    files.write_json(version.attempts, attempts)  # the second was lost, the third goes on
    one.write_record({})
    about = files.read_json(version.record)["provenance"]
    assert about["hardware"]["nodes"] == about["hardware"]["processes"] == 1
    assert 3000 <= about["cost"]["cpu_seconds"] < 3 * (1000 + 600)  # 3 CPUs, and this attempt's seconds


def test_each_file_that_is_hashed_at_the_end_is_a_sign_of_life(stage):
    """A checkpoint of a terabyte takes longer than `step_timeout`: the training was killed for hanging."""
    one = stage()
    final = one.version.iteration_directory(one.settings.train_iters)
    final.mkdir(parents=True)
    (final / "__0_0.distcp").write_bytes(b"weights")
    Heartbeat(one.version.heartbeat, one.settings.train_iters, writer=True).beat(one.settings.train_iters)
    os.utime(one.version.heartbeat, (0, 0))
    one.write_record({})
    assert one.version.heartbeat.stat().st_mtime > 0


def test_a_directory_in_the_place_of_the_link_is_refused_before_the_training(args, tmp_path: Path):
    (tmp_path / "ckpt/pretrain/one").mkdir(parents=True)
    with pytest.raises(UserError, match="one is a directory, not a link to a version; move it away"):
        run_stage(args(), lambda stage: pytest.fail("it trained"))


def test_a_stage_that_is_only_identified_changes_nothing(stage, tmp_path: Path):
    handlers, level = logger.handlers[:], logger.level
    environment = dict(os.environ)
    assert stage().version.directory.parent == tmp_path / "ckpt/versions"
    assert (logger.handlers, logger.level, dict(os.environ)) == (handlers, level, environment)
    assert not (tmp_path / "ckpt").exists() and not (tmp_path / "logs").exists()


def test_the_version_keeps_the_log_of_every_attempt(stage, tmp_path: Path):
    for attempt in ("first", "second"):
        one = stage()
        one.open_logs(tmp_path / "logs/one.log")
        logger.setLevel(logging.INFO)
        logger.info("%s attempt", attempt)
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
    assert "second attempt" in (tmp_path / "logs/one.log").read_text()
    assert "first attempt" not in (tmp_path / "logs/one.log").read_text()
    kept = one.version.log.read_text()
    assert kept.index("first attempt") < kept.index("second attempt")


def test_settings_of_another_shape_are_refused(stage, settings):
    """A person who edits a printed command may misspell a key, which is not left out silently."""
    broken = json.dumps(json.loads(settings()[0].model_dump_json()) | {"train_iter": 5})
    with pytest.raises(UserError, match=r"--settings: train_iter: Extra inputs are not permitted"):
        stage(text=broken)

"""Checkpoints: what is loaded is what was saved, and a broken one is never taken for a whole one."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.files import partial
from snaketron.jobs.launch import STOP_SIGNALS
from snaketron.jobs.owner import TOKEN
from snaketron.jobs.version import Version
from snaketron.log import UserError
from snaketron.model.checkpoint import load
from snaketron.train.batches import Batches, sequences
from snaketron.train.build import build_training
from snaketron.train.loop import Trainer

import pytest
import torch


class Random(Batches):
    """Sequences of random tokens, each a function of its number."""

    def has(self, split: str) -> bool:
        return split == "train"

    def collate(self, split: str, indices: Sequence[int]) -> dict:
        tokens = torch.stack(
            [torch.randint(0, 256, (17,), generator=torch.Generator().manual_seed(i)) for i in indices]
        )
        positions = torch.arange(16).expand(len(indices), 16)
        return sequences(tokens[:, :-1], tokens[:, 1:], positions, depths=1)


@pytest.fixture
def trainer(settings):
    def make(seed: int = 1, steps: int = 0, **keys) -> Trainer:
        torch.manual_seed(seed)
        made = Trainer(build_training(*settings(**keys), 256))
        for _ in range(steps):
            made._step(Random(2))
        return made

    return make


def test_a_signal_counts_from_the_step_on_after_which_all_processes_know_it(trainer):
    """One that reaches a process after a step's sums is for the next step: the others go on, too."""
    made = trainer(steps=1)
    with made.stopping.noted():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert made.stopping.agreed == 0
    made._step(Random(2))
    assert made.stopping.agreed == signal.SIGUSR1


def test_a_process_that_fails_says_why_though_srun_ends_it_for_another_that_died(trainer, monkeypatch):
    """The signal came before its last words, and SIGTERM passed for what ended the attempt."""
    monkeypatch.setenv(TOKEN, "one")
    made, before = trainer(), {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with pytest.raises(ZeroDivisionError), made.stopping.noted():
            _ = 1 / 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert made.stopping.received == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def state(trainer: Trainer) -> list[torch.Tensor]:
    """Weights, buffers (the router's biases), and the optimizer's moments and main weights."""
    moments = [
        tensor
        for one in trainer.optimizer.chained_optimizers
        for group in one.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *(v for _, v in sorted(one.optimizer.state.get(parameter, {}).items())))
        if isinstance(tensor, torch.Tensor)
    ]
    return [t.detach().clone() for t in (*trainer.model.parameters(), *trainer.model.buffers(), *moments)]


def same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def shards(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_loaded_is_what_was_saved_bit_for_bit(trainer, tmp_path: Path, precision: str):
    first = trainer(steps=3, model={"precision": precision})
    first.save(tmp_path)
    second = trainer(seed=2, model={"precision": precision})
    assert not same(state(second), state(first))
    assert second.resume(tmp_path)
    assert same(state(second), state(first)) and len(state(first)) > 50
    assert second.iteration == 3 and torch.equal(second.totals.sums.values, first.totals.sums.values)
    # And so does the next step.
    first._step(Random(2))
    second._step(Random(2))
    assert same(state(second), state(first))


def test_a_phase_of_another_precision_goes_on_with_weights_and_moments(trainer, tmp_path: Path):
    """Weights are rounded to the 8 bits of bf16; the optimizer's moments are fp32 in both."""
    first = trainer(steps=3, model={"precision": "fp32"})
    first.save(tmp_path)
    second = trainer(seed=2, model={"precision": "bf16"})
    load(tmp_path, 3, second.model, second.optimizer)
    weights = [list(one.model.parameters()) for one in (second, first)]
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(*weights, strict=True))
    count = len(weights[0]) + len(list(first.model.buffers()))
    moments = [[t for t in state(one)[count:] if t.dtype == torch.float32] for one in (second, first)]
    assert moments[0] and same(*([t for i, t in enumerate(of) if i % 3] for of in moments))


def test_a_new_directory_has_nothing_to_resume(trainer, tmp_path: Path):
    assert Version(tmp_path).latest_iteration() is None
    one = trainer()
    assert not one.resume(tmp_path) and one.iteration == 0


def test_an_interrupted_save_is_ignored_and_replaced(trainer, tmp_path: Path):
    one = trainer(steps=1)
    one.save(tmp_path)
    leftover = partial(Version(tmp_path).iteration_directory(2))
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    (leftover / "of_another_attempt").write_bytes(b"")
    two = trainer(seed=2)
    assert two.resume(tmp_path) and two.iteration == 1
    two._step(Random(2))
    two.save(tmp_path)
    assert not leftover.exists()
    assert sorted(shards(tmp_path / "iter_0000002")) == sorted(shards(tmp_path / "iter_0000001"))
    assert trainer(seed=3).resume(tmp_path)


def test_a_complete_checkpoint_that_latest_does_not_name_is_not_taken(trainer, tmp_path: Path):
    """LATEST is written last: killed just before it, a run continues from the one before and replaces it."""
    one = trainer(steps=1)
    one.save(tmp_path)
    one._step(Random(2))
    one.save(tmp_path)
    whole = shards(tmp_path / "iter_0000002")
    Version(tmp_path).latest.write_text("1")
    (tmp_path / "iter_0000002/__0_0.distcp").write_bytes(b"anything")
    two = trainer(seed=2)
    assert two.resume(tmp_path) and two.iteration == 1
    two._step(Random(2))
    two.save(tmp_path)
    found = shards(tmp_path / "iter_0000002")
    assert found.keys() == whole.keys() == {"__0_0.distcp", ".metadata", "metadata.json"}
    assert found["__0_0.distcp"] == whole["__0_0.distcp"]  # the same bytes in every run
    assert Version(tmp_path).latest.read_text() == "2"


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [4, 6]), (5, [2, 4, 6])])
def test_the_newest_checkpoints_are_kept(
    trainer, tmp_path: Path, keep: int, left: list[int], background: bool
):
    one = trainer(steps=1, keep_checkpoints=keep, keep_steady=0, save_in_background=background)
    for one.iteration in (2, 4, 6):
        one.save(tmp_path)
    assert one.saver.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"iter_{i:07d}" for i in left),
        "latest_checkpointed_iteration.txt",
    ]


def test_a_save_on_a_full_disk_leaves_the_checkpoint_before_it_and_no_partial_one(trainer, tmp_path: Path):
    one = trainer(steps=1, keep_checkpoints=1)
    one.save(tmp_path)
    one._step(Random(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))  # of the 1 MB
    try:
        with pytest.raises(UserError, match="iter_0000002: the checkpoint cannot be written"):
            one.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", Version(tmp_path).latest.name]
    assert trainer(seed=2).resume(tmp_path)
    one.save(tmp_path)  # there is room again
    assert Version(tmp_path).latest_iteration() == 2


def test_a_failed_rename_leaves_the_checkpoint_before_it(trainer, tmp_path: Path):
    """Something lies where the checkpoint is renamed to: LATEST still names a whole one."""
    one = trainer(steps=1, keep_checkpoints=1)
    one.save(tmp_path)
    one.iteration = 2
    (tmp_path / "iter_0000002").write_text("in the way")
    with pytest.raises(OSError):
        one.save(tmp_path)
    assert Version(tmp_path).latest_iteration() == 1
    assert trainer(seed=2).resume(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten", "gone", "metadata", "no metadata"])
def test_a_damaged_checkpoint_is_named(trainer, tmp_path: Path, damage: str):
    trainer(steps=1).save(tmp_path)
    directory = tmp_path / "iter_0000001"
    (shard,) = directory.glob("*.distcp")
    content = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "emptied":
        shard.write_bytes(b"")
    elif damage == "overwritten":
        shard.write_bytes(bytes(len(content)))
    elif damage == "gone":
        shard.unlink()
    elif damage == "metadata":
        (directory / ".metadata").write_bytes((directory / ".metadata").read_bytes()[:100])
    else:
        (directory / ".metadata").unlink()
    with pytest.raises(UserError) as error:
        trainer(seed=2).resume(tmp_path)
    assert str(error.value).startswith(f"{directory}: the checkpoint cannot be read (")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_run_continues_from_the_checkpoint_before_a_deleted_one(trainer, tmp_path: Path):
    one = trainer(steps=1)
    one.save(tmp_path)
    one._step(Random(2))
    one.save(tmp_path)
    shutil.rmtree(tmp_path / "iter_0000002")  # as the message about a damaged one asks
    two = trainer(seed=2)
    assert two.resume(tmp_path) and two.iteration == 1
    shutil.rmtree(tmp_path / "iter_0000001")
    assert not trainer(seed=3).resume(tmp_path)


def test_a_base_gives_its_weights_and_not_its_optimizer(trainer, tmp_path: Path):
    one = trainer(steps=1)
    one.save(tmp_path)
    two = trainer(seed=2)
    two.start_from(tmp_path, optimizer_of_base=False)
    assert same(list(two.model.parameters()), list(one.model.parameters()))
    assert two.iteration == 0 and not same(state(two), state(one))
    # The optimizer steps from those weights, not from the random ones: a step of rate 0 keeps them.
    two.settings.schedule.warmup = 10
    two.schedule.lr_warmup_steps = 10
    two._step(Random(2))
    assert same(list(two.model.parameters()), list(one.model.parameters()))


def test_the_configuration_decides_the_rates_of_a_loaded_optimizer(trainer, tmp_path: Path):
    one = trainer(steps=1, optimizer={"weight_decay": 0.3, "adam_beta1": 0.8})
    one.save(tmp_path)
    rates = {"learning_rate": 1e-4, "min_learning_rate": 1e-5}  # as of a phase with a rate of its own
    two = trainer(optimizer={"weight_decay": 0.2, "adam_beta1": 0.7} | rates)
    two.start_from(tmp_path, optimizer_of_base=True)
    groups = two.optimizer.param_groups
    assert {(g["max_lr"], g["min_lr"]) for g in groups} == {(1e-4, 1e-5)}
    assert same(state(two), state(one))  # its moments too
    assert {g["betas"] for g in groups} == {(0.7, 0.95)}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.2}


def test_a_directory_that_is_no_checkpoint_is_no_base(trainer, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"no latest_checkpointed_iteration.txt there; it is not a checkpoint"
    ):
        trainer().start_from(tmp_path, optimizer_of_base=True)


def test_a_checkpoint_written_in_the_background_is_that_of_the_step_it_was_saved_at(trainer, tmp_path: Path):
    """Although the training goes on while it is written."""
    made = trainer(steps=2, save_in_background=True)
    before = state(made)
    made.save(tmp_path / "behind")
    assert Version(tmp_path / "behind").latest_iteration() is None
    made._step(Random(2))
    assert not same(state(made), before)
    assert made.saver.finish()
    waited = trainer(steps=2)
    waited.save(tmp_path / "waited")
    first, second = (shards(tmp_path / name / "iter_0000002") for name in ("behind", "waited"))
    assert first.keys() == second.keys()
    assert all(first[name] == second[name] for name in first if name.endswith(".distcp"))
    other = trainer(seed=9)
    assert other.resume(tmp_path / "behind") and other.iteration == 2
    assert same(state(other), before)


def test_the_next_save_waits_for_the_one_in_the_background(trainer, tmp_path: Path):
    made = trainer(steps=1, save_in_background=True)
    made.save(tmp_path)
    made._step(Random(2))
    made.save(tmp_path)
    assert Version(tmp_path).latest_iteration() == 1
    made.saver.finish()
    assert Version(tmp_path).latest_iteration() == 2
    assert not list(tmp_path.glob(".*"))


def test_a_save_in_the_background_on_a_full_disk_is_told_when_it_ends(trainer, tmp_path: Path):
    made = trainer(steps=1, save_in_background=True)
    made.save(tmp_path)
    made._step(Random(2))
    made.saver.finish()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a full disk, for files of this process
    try:
        made.save(tmp_path)
        with pytest.raises(UserError, match=r"iter_0000002: the checkpoint cannot be written"):
            made.saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Version(tmp_path).latest_iteration() == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", Version(tmp_path).latest.name]


def test_samples_are_taken_before_the_training_on_the_way_and_after_it(settings, tmp_path: Path):
    """Every 2 of 5 steps; a run that continues after step 4 takes the one that is left."""
    taken: list[int] = []

    def train() -> None:
        values, run = settings()  # 320 tokens in steps of 4 x 16
        run = run.model_copy(update={"sample_interval": 2, "save_interval": 4})
        made = Trainer(build_training(values, run, 256))
        made.resume(tmp_path)
        made.train(Random(2), tmp_path, lambda: taken.append(made.iteration))

    train()
    assert taken == [0, 2, 4, 5]
    shutil.rmtree(tmp_path / "iter_0000005")
    Version(tmp_path).latest.write_text("4")
    train()
    assert taken == [0, 2, 4, 5, 5]

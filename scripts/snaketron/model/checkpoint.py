"""Checkpoints in megatron-core's `torch_dist` format, each complete or absent.

A version directory holds `iter_0000100/` and `latest_checkpointed_iteration.txt`, as Megatron's tools
expect. A checkpoint is written aside and renamed by rank 0 when every rank has finished.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import secrets
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from snaketron.files import no_room, partial
from snaketron.jobs import launch
from snaketron.jobs.owner import check_owner
from snaketron.jobs.version import Version
from snaketron.log import NO_SPACE, UserError
from snaketron.model import backend
from snaketron.model.lora import Part
from snaketron.model.megatron import optimizer_state
from snaketron.model.megatron.host_memory import HostMemory
from snaketron.model.megatron.stored import Loading, Stored
from snaketron.settings.keeping import is_steady, kept
from snaketron.settings.training import RunSettings
from snaketron.wording import ended_with

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import (
    get_default_save_sharded_strategy,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException


class Saver:
    """Writes the checkpoints of a training; in the background, a process beside each rank writes meanwhile.

    Each is complete or absent either way: it is written aside, and renamed when every rank has written.
    """

    def __init__(self, *, run: RunSettings, steady: int, background: bool) -> None:
        self.run, self.steady, self.background = run, steady, background
        self.queue = AsyncCallsQueue()
        self.memory = HostMemory()
        self.deleting: list[threading.Thread] = []
        self.writer: Any = None  # the process that writes, or wrote last, in the background

    @classmethod
    def configured(cls, run: RunSettings, steady: int = 0) -> Saver:
        """A saver for `run`; in the background by default where a GPU computes, since the CPU is then idle.

        The learning rate falls after `steady` steps.
        """
        background = backend.HAS_GPU if run.save_in_background is None else run.save_in_background
        return cls(run=run, steady=steady, background=background)

    def prepare(self, optimizer: MegatronOptimizer) -> None:
        """Get host memory ready for what a GPU's checkpoint copies, while the training goes on."""
        if backend.HAS_GPU and self.background:
            self.memory.reserve(optimizer_state.saved_bytes(optimizer))

    def is_due(self, iteration: int) -> bool:
        """Whether a checkpoint is written after so many steps."""
        return iteration % self.run.save_interval == 0 or is_steady(iteration, self.run, self.steady)

    def save(
        self,
        directory: Path,
        iteration: int,
        model: HybridModel | Part,
        optimizer: MegatronOptimizer | None,
        progress: dict[str, Any],
    ) -> None:
        """Write `iter_<iteration>`, name it the latest, and delete the checkpoints that are not kept.

        `progress` is a small dictionary, equal on all ranks. Without an optimizer the checkpoint is a base
        for trainings and does not continue one. All ranks must call this. In the background the checkpoint is
        there when `finish` has returned true.
        """
        self.finish()
        version = Version(directory)
        target = version.iteration_directory(iteration)
        temporary = _make_temporary(version, target)
        self.memory.reuse()
        metadata = _metadata() | {"memory": self.memory}
        state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata), "progress": progress}
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=False, metadata=metadata)
        for name in ("dp_cp_group", "memory"):
            metadata.pop(name)
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        with self._explained(temporary, target):
            request = dist_checkpointing.save(
                state,
                temporary,
                strategy,
                content_metadata=metadata,
                async_sharded_save=True,
                async_strategy="mcore",
            )
            if request.preload_fn is not None:  # a rank may have nothing to write
                preload = functools.partial(self.memory.preload, request.preload_fn.args[0])
                request = request._replace(preload_fn=preload)
            if not self.background:
                request.execute_sync()
        if not self.background:
            self._publish(version, iteration, temporary)
            return
        request.add_finalize_fn(lambda: self._publish(version, iteration, temporary))
        if request.async_fn is not None:
            request = request._replace(async_fn=functools.partial(_write, request.async_fn))
        self.written = temporary, target
        self.queue.schedule_async_request(request)
        self.writer = self.queue.async_calls[-1].async_caller.process

    def finish(self, *, wait: bool = True) -> bool:
        """Publish what was written in the background; `wait` for it if asked. True when nothing is left.

        All ranks must call this.
        """
        if self.queue.get_num_unfinalized_calls():
            with self._explained(*self.written):
                self.queue.maybe_finalize_async_calls(blocking=wait)
        while wait and self.deleting:
            self.deleting.pop().join()
        return not self.queue.get_num_unfinalized_calls()

    def _publish(self, version: Version, iteration: int, temporary: Path) -> None:
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            check_owner(version)
            target = version.iteration_directory(iteration)
            shutil.rmtree(target, ignore_errors=True)  # a killed attempt did not name it latest
            temporary.replace(target)
            version.name_latest(iteration)
            iterations = version.iterations()
            for old in set(iterations) - kept(iterations, self.run, self.steady):
                self._delete(version.iteration_directory(old))
        torch.distributed.barrier()

    @contextlib.contextmanager
    def _explained(self, temporary: Path, target: Path) -> Iterator[None]:
        """Say what a failed write means, and give its space back."""
        try:
            yield
        except CheckpointException as error:  # on all ranks, as soon as one cannot write; rank 0 knows why
            problem, cause = self._shared_problem(temporary, error)
            self._give_up(temporary, target, problem, cause, error)
        except OSError as error:  # on this rank alone: the others wait for it, and end when it has ended
            self._give_up(temporary, target, NO_SPACE.get(error.errno or 0), str(error), error)

    def _shared_problem(self, temporary: Path, error: CheckpointException) -> tuple[str | None, str]:
        """Why there is no room on some rank, if so, and what went wrong; the same on all ranks."""
        # The reason is lost on the way: torch says only that it is not where it should be in the file.
        room = no_room(temporary, 16_000_000)
        status = self.writer.exitcode if self.writer else 0
        died = f"the process that writes it {ended_with(status)}" if status else ""
        said: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(said, (room, died, str(_cause(error))))
        rooms, deaths, causes = zip(*said, strict=True)
        return next(filter(None, rooms), None), next(filter(None, deaths), causes[0])

    def _give_up(
        self, temporary: Path, target: Path, problem: str | None, cause: str, error: BaseException
    ) -> NoReturn:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # the space is wanted
        if problem:
            raise UserError(
                f"{target}: the checkpoint cannot be written ({problem}); free some and run the same command "
                "again to continue from the one before it"
            ) from error
        raise RuntimeError(f"{target}: the checkpoint cannot be written: {cause}") from error

    def _delete(self, checkpoint: Path) -> None:
        """Delete in the background if checkpoints are written there: a file system may take seconds."""
        aside = checkpoint.rename(partial(checkpoint))
        if not self.background:
            shutil.rmtree(aside)
            return
        thread = threading.Thread(target=shutil.rmtree, args=[aside], kwargs={"ignore_errors": True})
        thread.start()
        self.deleting.append(thread)


def _make_temporary(version: Version, target: Path) -> Path:
    """The directory that a checkpoint is written to, on all ranks; those of killed attempts are deleted."""
    # A writer may outlive a killed training, and must not write into what the next attempt writes.
    attempt = [secrets.token_hex(4)]
    torch.distributed.broadcast_object_list(attempt, src=0)
    temporary = partial(target.with_name(f"{target.name}.{attempt[0]}"))
    if torch.distributed.get_rank() == 0:
        version.remove_partial()
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    return temporary


def _write(write: Callable[..., None], *args: Any, **options: Any) -> None:
    """Write in a process beside the one that trains, and end with that: it has the GPU open, too."""
    launch.die_with_parent(signal.SIGKILL)
    trains = multiprocessing.parent_process()
    if trains and trains.pid != os.getppid():
        return  # it was killed before
    write(*args, **options)


def load(
    directory: Path, iteration: int, model: HybridModel | Part, optimizer: MegatronOptimizer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into the model, and into the optimizer if given; whatever layout it was saved with.

    Returns its `progress`. Raises `UserError` when the checkpoint cannot be read.
    """
    source = Version(directory).iteration_directory(iteration)
    with Stored(source) as stored:
        try:
            return _load(stored, model, optimizer)
        except (OSError, CheckpointException, dist_checkpointing.core.CheckpointingException) as error:
            cause = _cause(error)
            raise UserError(
                f"{source}: the checkpoint cannot be read ({type(cause).__name__}: {cause}); "
                "delete it and run again, to continue from the one before it"
            ) from error


def _load(stored: Stored, model: HybridModel | Part, optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    """`load`, of a checkpoint that is open. Raises what is raised where it is damaged."""
    source = stored.directory
    metadata = _metadata() | {"stored": stored}
    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata), "progress": {}}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=metadata)
    _leave_out_absent_extra_state(state["model"], source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own calls of torch
        state = dist_checkpointing.load(state, source, Loading(stored, backend.device()))
    with backend.trusting_extra_state():  # a training of this workflow wrote it
        missing = model.load_state_dict(state["model"], strict=False).missing_keys
    absent = [key for key in missing if not key.endswith(_EXTRA_STATE)]
    if absent:
        raise AssertionError(f"{source} does not hold {absent}")
    if optimizer is not None:
        before = [
            {k: v for k, v in group.items() if k not in ("params", "step")}
            for group in optimizer.param_groups
        ]
        _configure_rates(state["optimizer"], optimizer)
        optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(optimizer.param_groups, before, strict=True):
            # Keep values that only this machine's optimizer has, and configured ones.
            group.update({k: v for k, v in values.items() if k in _CONFIGURED or k not in group})
    return state["progress"]


def _configure_rates(state: Any, optimizer: MegatronOptimizer) -> None:
    """Put the configured rates into the groups of a saved optimizer.

    megatron-core finds the saved group of a parameter by its rates among other values, and a phase with a
    rate of its own starts from the optimizer of a phase without.
    """
    for name in ("max_lr", "min_lr"):
        rates = {group.get(name) for group in optimizer.param_groups}
        for group in _groups(state) if len(rates) == 1 else ():
            if name in group:
                group[name] = next(iter(rates))


def _groups(state: Any) -> Iterator[dict[str, Any]]:
    """The groups of a saved optimizer, or of the several ones that a chained optimizer has."""
    for key, value in state.items() if isinstance(state, dict) else ():
        if key == "param_groups":
            yield from value
        else:
            yield from _groups(value)


# What Transformer Engine's modules keep beside their weights: nothing, or the scales of fp8.
_EXTRA_STATE = "_extra_state"


def _leave_out_absent_extra_state(state: dict[str, Any], source: Path) -> None:
    """Do not ask for the extra state of modules where the checkpoint has none, as one made on a CPU."""
    asked = [key for key, value in state.items() if isinstance(value, ShardedObject) and _EXTRA_STATE in key]
    if not asked:
        return
    try:
        there = load_sharded_metadata(str(source))
    except Exception:  # of many kinds; the load that follows says what is damaged
        return
    for key in asked:
        if state[key].unique_key not in there:
            del state[key]


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank where it did: torch's exception holds a traceback of each.

    megatron-core raises it on all ranks, and those are on the first one alone.
    """
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


# Values of an optimizer group that the configuration decides, not the checkpoint.
_CONFIGURED = {"lr", "max_lr", "min_lr", "weight_decay", "betas", "eps"}


def _metadata() -> dict[str, Any]:
    """How megatron-core lays out the shards: so that any other parallel layout can read them."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }

"""Processes that share a model, for tests that need no training.

They are forked from a process that has imported megatron-core once and done nothing else: a process of a test
cannot fork them, because it has a process group of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from tests.conftest import free_port

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["snaketron.train.build", "snaketron.inference.generate"])


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of `count` processes; it must enter `distributed` itself.

    The function and its arguments are pickled, so the function must be one of a module.
    """
    port = free_port()
    results = _server.Queue()
    processes = [
        _server.Process(target=_run, args=(rank, count, port, function, args, results), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    assert not (failed := [trace for ok, trace in found.values() if not ok]), failed[0]
    return [found[rank][1] for rank in range(count)]


def _run(
    rank: int, count: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        results.put((rank, (True, function(*args))))
    except BaseException:
        results.put((rank, (False, traceback.format_exc())))
        raise

"""What a training does in a step: what the estimates of its memory, its traffic and its time take."""

from __future__ import annotations

from typing import NamedTuple

from snaketron.config import Model, Optimizer, Run
from snaketron.config.base import Dispatcher


class Work(NamedTuple):
    """What a training does in a step."""

    model: Model
    vocab_size: int
    seq_length: int
    global_batch_size: int
    run: Run
    optimizer: Optimizer
    cuda_graphs: bool = False  # of attention and Mamba layers
    recorded: bool = False  # whole micro-batches (`recording.recordable`)
    # alltoall: each copy of a token crosses by itself; allgather: one copy to each GPU that shares experts;
    # hybridep: one to each NVLink domain.
    dispatcher: Dispatcher = "alltoall"
    frozen: bool = False  # adapters: no gradients of weights
    keeps_scan: bool = True  # Mamba's scan keeps its intermediate results, as here now

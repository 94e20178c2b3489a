"""What a training does in a step: what the estimates of its memory, its traffic and its time take."""

from __future__ import annotations

from typing import NamedTuple

from snaketron.config import Adapters, Model, Optimizer, Run
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
    keeps_scan: bool = True  # Mamba's scan keeps its intermediate results, as here now

    @property
    def micro_batches(self) -> float:
        """Micro-batches of each process of data parallelism."""
        return self.global_batch_size / (self.run.micro_batch_size * self.run.parallel.data_parallel_size)

    @property
    def tokens_of_process(self) -> float:
        """Tokens of a micro-batch on a process of context parallelism."""
        return self.run.micro_batch_size * self.seq_length / self.run.parallel.context_parallel_size

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that it trains; None where it trains the model itself."""
        return self.run if isinstance(self.run, Adapters) else None

    @property
    def frozen(self) -> bool:
        """Whether the weights stay as they are, beside adapters."""
        return self.adapters is not None

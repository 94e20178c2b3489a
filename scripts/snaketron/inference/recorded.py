"""The step of all rows of a decoder, recorded as a CUDA graph, so that the host starts it as a whole.

Between two tokens of few rows a GPU has little to compute, so a host that starts kernel after kernel is what
one waits for.
"""

from __future__ import annotations

from collections.abc import Callable

from snaketron.model import backend
from snaketron.model.build import BuiltModel

import torch
from torch import Tensor

# Steps that start kernel after kernel: in them kernels are compiled and tuned.
WARM_UP = 2


def recordable(built: BuiltModel) -> bool:
    """Whether nothing in a step waits for the host: one process has the whole model, and experts are in bf16.

    Experts in fp32 get their numbers of tokens from the host (`megatron.gpu`), and tokens that travel between
    GPUs make it wait. A training in fp8 may answer too, for samples, and keeps maxima of what it has seen.
    """
    return (
        backend.device().type == "cuda"
        and torch.distributed.get_world_size() == 1
        and built.settings.model.precision == "bf16"
    )


class Recorded:
    """Called with ids (rows, 1), it gives logits (rows, 1, vocabulary), as the step that it records.

    The step must read and write the same memory each time, for as many rows.
    """

    def __init__(self, step: Callable[[Tensor], Tensor | None]) -> None:
        self.step = step
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, ids: Tensor) -> Tensor | None:
        if self.steps < WARM_UP:
            self.steps += 1
            return self.step(ids)
        if self.graph is None:
            self._record(ids)
        assert self.graph is not None and self.logits is not None
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits.clone()

    def _record(self, ids: Tensor) -> None:
        self.ids = ids.clone()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, as one does that watches NCCL.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self.step(self.ids)
        self.graph = graph

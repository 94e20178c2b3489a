"""The forward and backward pass of a micro-batch, recorded once as a CUDA graph and started as a whole.

The host needs 0.4 s to start the kernels of a micro-batch of 52 layers one by one, and an H200 computes
4,096 tokens of such a model in half of that. A recording has the routed experts and multi-token prediction in
it, since nothing in them waits for the host (`gpu`, `experts`); gradients are added to those of the
micro-batches before. The optimizer's step is not in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.random import get_all_rng_states
from megatron.core.utils import get_model_config

# Steps that start kernel after kernel: in them kernels are compiled and tuned, and lasting buffers are made.
WARM_UP = 2


class Recorder:
    """A schedule as megatron-core's without a pipeline: the same arguments by name and the same result.

    It is for trainings in which one process holds the whole model (`backend.records_micro_batches`).
    """

    def __init__(self) -> None:
        self.steps = 0
        self.recordings: dict[Any, _Recording] = {}
        self.memory: Any = None  # in which all recordings compute, one after the other

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Iterator[dict[str, Any]],
        model: list[Any],
        num_microbatches: int,
        forward_only: bool = False,
        **others: Any,
    ) -> list[Any]:
        if forward_only or self.steps < WARM_UP:
            self.steps += not forward_only
            return schedules.forward_backward_no_pipelining(
                forward_step_func=forward_step_func,
                data_iterator=data_iterator,
                model=model,
                num_microbatches=num_microbatches,
                forward_only=forward_only,
                **others,
            )
        config = get_model_config(model[0])
        outputs = []
        tokens = torch.zeros((), dtype=torch.int, device="cuda")
        for i in range(num_microbatches):
            batch = next(data_iterator)
            # The first micro-batch of a step rounds the weights to fp8 for the others too.
            recording = self._recording(forward_step_func, batch, model[0], bool(config.fp8) and i == 0)
            outputs.append(recording.replay(batch))
            tokens += recording.tokens
        config.finalize_model_grads_func(model, tokens)
        return outputs

    def _recording(
        self, forward_step_func: Any, batch: dict[str, Any], model: Any, first: bool
    ) -> _Recording:
        key = (first, *_constants(batch))
        if key not in self.recordings:
            self.memory = self.memory or torch.cuda.graph_pool_handle()
            self.recordings[key] = _Recording(forward_step_func, batch, model, first, self.memory)
        return self.recordings[key]


class _Recording:
    """One CUDA graph with the memory that it reads and writes."""

    def __init__(
        self, forward_step_func: Any, batch: dict[str, Any], model: Any, first: bool, memory: Any
    ) -> None:
        config = get_model_config(model)
        self.batch = _copies(batch)
        self.graph = torch.cuda.CUDAGraph()
        for state in get_all_rng_states().values():
            self.graph.register_generator_state(state)
        outputs: list[Any] = []
        # Other threads may use the GPU meanwhile, as one does that watches NCCL.
        with torch.cuda.graph(
            self.graph,
            pool=memory,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            loss, self.tokens = schedules.forward_step(
                forward_step_func,
                iter([dict(self.batch)]),
                model,
                1,
                None,
                outputs,
                config,
                1,
                is_first_microbatch=first,
                current_microbatch=0,
            )
            schedules.backward_step(None, loss, None, config)
        [self.output] = outputs

    def replay(self, batch: dict[str, Any]) -> Any:
        """Add the gradients of a micro-batch; returns what its loss function reports."""
        _refill(self.batch, batch)
        self.graph.replay()
        return dataclasses.replace(self.output, values=self.output.values.clone())


def _copies(batch: dict[str, Any]) -> dict[str, Any]:
    """A copy of a micro-batch, in memory that a recording keeps."""
    return {
        name: value.clone()
        if isinstance(value, torch.Tensor)
        else dataclasses.replace(value, **{part: tensor.clone() for part, tensor in _tensors(value).items()})
        for name, value in batch.items()
    }


def _refill(kept: dict[str, Any], batch: dict[str, Any]) -> None:
    """Copy a micro-batch into the memory of an earlier one of the same constants."""
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            kept[name].copy_(value)
        else:
            for part, tensor in _tensors(value).items():
                getattr(kept[name], part).copy_(tensor)


def _tensors(report: Any) -> dict[str, torch.Tensor]:
    """The parts of a report that are inputs of a recording: weights, and the source of each sequence."""
    return {name: value for name, value in vars(report).items() if isinstance(value, torch.Tensor)}


def _constants(batch: dict[str, Any]) -> tuple[Any, ...]:
    """Shapes of a micro-batch and numbers of its report, which a recording holds as they were."""
    report = vars(batch["report"])
    tensors = {name: value for name, value in batch.items() if name != "report"} | _tensors(batch["report"])
    shapes = tuple((name, tuple(value.shape)) for name, value in tensors.items())
    return (*shapes, *((name, value) for name, value in report.items() if name not in tensors))

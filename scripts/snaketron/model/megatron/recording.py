"""The forward and backward pass of a micro-batch, recorded once as a CUDA graph and started as a whole.

The host needs 0.4 s to start the kernels of a micro-batch of 52 layers one by one, and an H200 computes
4,096 tokens of such a model in half of that. A recording has the routed experts and multi-token prediction in
it, since nothing in them waits for the host (`gpu`, `experts`). That of a step's first micro-batch begins the
gradients (`gradients`) and rounds weights to fp8; the others add to them. The optimizer's step is not in it.
Packs have a recording for each number of sequences and each longest one, as the host sees them
(`train.sft_batches`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from snaketron.model.megatron.gradients import Beginning, together

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.random import get_all_rng_states
from megatron.core.utils import get_model_config

# Steps that start kernel after kernel: in them kernels are compiled and tuned, and lasting buffers are made.
WARM_UP = 2


class Recorder:
    """A schedule as megatron-core's without a pipeline: the same arguments by name and the same result.

    It is for trainings in which one process holds all layers, or its share of each
    (`backend.records_micro_batches`).
    """

    def __init__(self) -> None:
        self.steps = 0
        self.recordings: dict[Any, _Recording] = {}
        self.memory: Any = None  # in which all recordings compute, one after the other
        self.gradients: Beginning | None = None

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
        if forward_only:
            return schedules.forward_backward_no_pipelining(
                forward_step_func=forward_step_func,
                data_iterator=data_iterator,
                model=model,
                num_microbatches=num_microbatches,
                forward_only=True,
                **others,
            )
        gradients = self.gradients = self.gradients or Beginning(model[0])
        self.steps += 1
        outputs = []
        tokens = torch.zeros((), dtype=torch.int, device="cuda")
        for i in range(num_microbatches):
            batch, begun = next(data_iterator), None if i else gradients
            if self.steps <= WARM_UP:
                output, its_tokens = _compute(forward_step_func, batch, model[0], begun)
            else:
                recording = self._recording(forward_step_func, batch, model[0], begun)
                output, its_tokens = recording.replay(batch), recording.tokens
            outputs.append(output)
            tokens += its_tokens
        get_model_config(model[0]).finalize_model_grads_func(model, tokens)
        return outputs

    def _recording(
        self, forward_step_func: Any, batch: dict[str, Any], model: Any, begun: Beginning | None
    ) -> _Recording:
        key = (begun is not None, *_constants(batch))
        if key not in self.recordings:
            self.memory = self.memory or torch.cuda.graph_pool_handle()
            self.recordings[key] = _Recording(forward_step_func, batch, model, begun, self.memory)
        return self.recordings[key]


class _Recording:
    """One CUDA graph with the memory that it reads and writes."""

    def __init__(
        self,
        forward_step_func: Any,
        batch: dict[str, Any],
        model: Any,
        begun: Beginning | None,
        memory: Any,
    ) -> None:
        self.batch = _copies(batch)
        self.graph = torch.cuda.CUDAGraph()
        for state in get_all_rng_states().values():
            self.graph.register_generator_state(state)
        # Other threads may use the GPU meanwhile, as one does that watches NCCL.
        with torch.cuda.graph(
            self.graph,
            pool=memory,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            self.output, self.tokens = _compute(forward_step_func, self.batch, model, begun)

    def replay(self, batch: dict[str, Any]) -> Any:
        """Compute a micro-batch and its gradients; returns what its loss function reports."""
        _refill(self.batch, batch)
        self.graph.replay()
        return dataclasses.replace(self.output, values=self.output.values.clone())


def _compute(
    forward_step_func: Any, batch: dict[str, Any], model: Any, begun: Beginning | None
) -> tuple[Any, torch.Tensor]:
    """Compute a micro-batch and its gradients; returns what its loss function reports, and its tokens.

    `begun` is given for a step's first micro-batch, which begins the gradients and rounds weights to fp8.
    """
    config = get_model_config(model)
    outputs: list[Any] = []
    with begun.within() if begun else contextlib.nullcontext(), together():
        loss, tokens = schedules.forward_step(
            forward_step_func,
            iter([dict(batch)]),
            model,
            1,
            None,
            outputs,
            config,
            1,
            is_first_microbatch=begun is not None,
            current_microbatch=0,
        )
        schedules.backward_step(None, loss, None, config)
    [output] = outputs
    return output, tokens


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


def _tensors(parts: Any) -> dict[str, torch.Tensor]:
    """The tensors of a report, or of where the sequences of a pack begin: inputs of a recording."""
    return {name: value for name, value in vars(parts).items() if isinstance(value, torch.Tensor)}


def _constants(batch: dict[str, Any]) -> tuple[Any, ...]:
    """What a recording holds as it was: the shapes of a micro-batch, and numbers beside its tensors."""
    found = []
    for name, value in batch.items():
        parts = {"": value} if isinstance(value, torch.Tensor) else vars(value)
        found += [
            (name, part, tuple(one.shape) if isinstance(one, torch.Tensor) else one)
            for part, one in parts.items()
        ]
    return tuple(found)

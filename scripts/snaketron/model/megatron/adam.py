"""The step of megatron-core's distributed optimizer, without what makes the GPU wait for the host.

megatron-core reads the norm of the gradient on the host in the middle of the step, and handles each parameter
in Python several times; a layer of 64 experts has 128 of them. On an H200 the model of docs/measurements.md
spent 145 ms of each step there, of which the GPU worked for 35. Here the norm stays on the GPU, so that
the host prepares the step while the GPU still computes gradients, and tensors that stay where they are
are looked up once. The kernels, and so the results, are the same.
"""

from __future__ import annotations

from typing import Any

from snaketron.model.megatron.originals import original

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

COPY_GRADIENTS = (
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_model_grads_to_main_grads"
)
COPY_WEIGHTS = (
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_main_params_to_model_params"
)
GRADIENT_NORM = "megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm"


def _give_gradients(self: DistributedOptimizer) -> None:
    """Point each main weight to its gradient, a part of the fp32 buffer."""
    known = self.__dict__.get("_gradients")
    if known is None:
        original(COPY_GRADIENTS)(self)
        known = self.__dict__["_gradients"] = _gradients_in_place(self)
    elif known:
        for weight, gradient in known:
            weight.grad = gradient
    else:
        original(COPY_GRADIENTS)(self)


def _gradients_in_place(optimizer: DistributedOptimizer) -> list[tuple[Tensor, Tensor]]:
    """Main weights with their gradients; none if some gradient is a copy: in bf16, or given differently."""
    if getattr(optimizer, "is_stub_optimizer", False):
        return []
    pairs = []
    for models, weights in _groups(optimizer):
        for model, weight in zip(models, weights, strict=True):
            if weight is None or weight.grad is None:
                return []
            if weight.grad.untyped_storage().data_ptr() != model.main_grad.untyped_storage().data_ptr():
                return []
            pairs.append((weight, weight.grad))
    return pairs


def _give_weights(self: DistributedOptimizer) -> None:
    """Round main weights into the weights, all in a few kernels."""
    known = self.__dict__.get("_weights")
    if known is None:
        known = self.__dict__["_weights"] = _weights_in_place(self)
    if known:
        torch._foreach_copy_(*known)
    else:
        original(COPY_WEIGHTS)(self)


def _weights_in_place(optimizer: DistributedOptimizer) -> tuple[list[Tensor], list[Tensor]] | None:
    """Where each main weight goes in the buffer of weights, and the main weights."""
    if (
        getattr(optimizer, "is_stub_optimizer", False)
        or optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        or optimizer.ddp_config.fp8_param_gather
        or optimizer.ddp_config.fp4_param_gather
    ):
        return None
    targets, sources = [], []
    for models, weights in _groups(optimizer):
        for model, weight in zip(models, weights, strict=True):
            span = optimizer._get_model_param_range_map(model)["gbuf_world_in_bucket"]
            buffer, _, bucket = optimizer.model_param_gbuf_map[model]
            memory = optimizer.buffers[buffer].buckets[bucket].param_data
            targets.append(memory.view(-1)[span.start : span.end])
            sources.append(weight.detach())
    return (targets, sources) if targets else None


def _groups(optimizer: DistributedOptimizer) -> list[tuple[list[Any], list[Tensor]]]:
    """Groups of parameters of the model, and of the main weights of this process' part of each."""
    lists = [
        *zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True),
        *zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True),
    ]
    return [(list(models), list(weights)) for models, weights in lists]


def _gradient_norm(self: ChainedOptimizer) -> float | Tensor:
    """The norm over all parts; megatron-core's waits for it where experts have groups of their own."""
    if len(self.chained_optimizers) == 1 or self.grads_states_parallel_group_is_shared():
        return original(GRADIENT_NORM)(self)
    norms = [torch.as_tensor(part.get_grad_norm()).reshape(1) for part in self.chained_optimizers]
    return torch.cat(norms).norm(keepdim=True)

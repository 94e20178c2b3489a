"""The step of megatron-core's distributed optimizer, without what makes the GPU wait for the host.

megatron-core reads the norm of the gradient on the host in the middle of the step, and handles each parameter
in Python several times; a layer of 64 experts has 128 of them. On an H200 the model of docs/measurements.md
spent 145 ms of each step there, and the GPU worked for 35 of them. Here the norm stays on the GPU, so that
the host prepares the step while the GPU still computes gradients, and tensors that stay where they are
are looked up once. The kernels, and so the results, are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from snaketron.model.megatron.originals import original

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

if torch.cuda.is_available():
    from snaketron.model.megatron import kernels

COPY_GRADIENTS = (
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_model_grads_to_main_grads"
)
COPY_WEIGHTS = (
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_main_params_to_model_params"
)
L2_NORM = "megatron.core.optimizer.clip_grads:l2_norm_impl"
GRADIENT_NORM = "megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm"


def blocks(tensors: Sequence[tuple[int, ...]], block: int) -> Tensor:
    """What the kernels of Adam and of the norm go through: a row for each block of numbers of each tensor.

    Args:
        tensors: the addresses of each (bytes; two a number), and how many numbers it has. Adam takes five:
            of gradient, weight, both moments and remainder.
        block: numbers that a program takes.
    """
    rows = []
    for *addresses, count in tensors:
        # A block of that size is taken to begin at a multiple of 16 bytes.
        size = block if all(address % 16 == 0 for address in addresses) else block // 2
        starts = torch.arange(0, count, size, dtype=torch.int64)
        table = starts[:, None] * 2 + torch.tensor([*addresses, 0], dtype=torch.int64)
        table[:, -1] = (count - starts).clamp(max=size)
        rows.append(table)
    return torch.cat(rows) if rows else torch.zeros(0, 1, dtype=torch.int64)


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


@functools.lru_cache(maxsize=8)
def _table_of(places: tuple[tuple[int, int], ...]) -> Tensor:
    return blocks(places, kernels.SQUARES_BLOCK).to(torch.device("cuda"))


def l2_norm(
    chunk: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor | None]:
    """The norm of all tensors, (1,); of bf16 ones at the speed of memory, which is twice the original's."""
    if per_tensor or not all(
        t.is_cuda and t.dtype == torch.bfloat16 and t.is_contiguous() for t in tensors[0]
    ):
        return original(L2_NORM)(chunk, overflow, tensors, per_tensor)
    return kernels.norm(_table_of(tuple((t.data_ptr(), t.numel()) for t in tensors[0]))), None


class FusedStep:
    """Division by the tokens, clipping and AdamW in one pass, of bf16 gradients and moments on a GPU.

    megatron-core divides the gradients by the tokens of the step and scales them again to clip them, and
    Transformer Engine's AdamW moves 1.7 TB/s: on an H200 66 ms of a step with 4.1 billion parameters. Here
    both factors are part of the update, which moves 18 bytes a parameter. Gradients stay as they were summed.
    """

    def __init__(self, model: Any, optimizer: ChainedOptimizer, clip_grad: float) -> None:
        """Take over the parts of the step; the optimizer's own configuration does not clip."""
        self.optimizer, self.clip_grad = optimizer, clip_grad
        self.scaling: Tensor | float = 1.0
        self.scale: Tensor | None = None
        self.tables: dict[Any, tuple[list[tuple[int, ...]], Tensor]] = {}
        model.scale_gradients = self._note_scaling
        optimizer.get_grad_norm = self._norm  # type: ignore[method-assign]
        for part in optimizer.chained_optimizers:
            if not getattr(part, "is_stub_optimizer", False):
                part.optimizer.step = functools.partial(self._adam, part.optimizer)

    def _note_scaling(self, scaling: Tensor) -> None:
        self.scaling = scaling

    def _norm(self) -> Tensor:
        """The norm of the gradient, and from it the factor of the gradients."""
        norm = torch.as_tensor(_gradient_norm(self.optimizer)).reshape(1) * self.scaling
        clip = (self.clip_grad / (norm + 1e-6)).clamp(max=1.0) if self.clip_grad else 1.0
        self.scale = torch.ones_like(norm) * self.scaling * clip
        return norm

    def _adam(self, adam: Any) -> None:
        """Update the weights of a Transformer Engine FusedAdam, with its state as it keeps it."""
        assert self.scale is not None and adam.adam_w_mode and adam.store_param_remainders
        for number, group in enumerate(adam.param_groups):
            group["step"] = int(group.get("step", 0)) + 1
            beta1, beta2 = group["betas"]
            values = {name: group[name] for name in ("lr", "eps", "weight_decay")}
            table = self._table(adam, number, group["params"])
            kernels.adam(table, self.scale, values | {"beta1": beta1, "beta2": beta2}, group["step"])

    def _table(self, adam: Any, number: int, parameters: list[Any]) -> Tensor:
        """Where gradients, weights and state are, anew when one of them has another place."""
        assert self.scale is not None
        places = []
        for p in parameters:
            state = adam.state[p]
            if not state:
                adam.initialize_state(p, True)
            tensors = (p.decoupled_grad, p, state["exp_avg"], state["exp_avg_sq"], state["master_param"])
            assert all(t.element_size() == 2 and t.is_contiguous() for t in tensors)
            places.append((*(t.data_ptr() for t in tensors), p.numel()))
        known = self.tables.get((id(adam), number))
        if known is None or known[0] != places:
            known = self.tables[id(adam), number] = (
                places,
                blocks(places, kernels.ADAM_BLOCK).to(self.scale.device),
            )
        return known[1]

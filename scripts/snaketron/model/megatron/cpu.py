"""A CPU in place of the GPU that megatron-core asks torch for, and Transformer Engine's optimizer.

`replacements` says what each function stands for. torch.cpu is torch's twin of torch.cuda.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from snaketron.model.megatron import originals, packed

import torch
import torch.nn.functional as F
from torch import Tensor


class Stream(torch.cpu.Stream):
    """A stream that can record an event, as those of a GPU can."""

    def record_event(self, event: Any = None) -> Any:
        """An event that has happened: a CPU computes in the order of the program."""
        return torch.cpu.Event()


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The tensor factory, reading device="cuda" as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class TorchOnCpu(types.ModuleType):
    """`torch` as seen by a megatron-core module that writes the literal device "cuda"."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


torch_on_cpu = TorchOnCpu()


def on_torch_cpu(name: str) -> Callable[..., Any]:
    """The function of torch.cpu, as one of its own: torch._dynamo refuses one function under two names."""
    return functools.partial(getattr(torch.cpu, name))


current_device, set_device = on_torch_cpu("current_device"), on_torch_cpu("set_device")
synchronize, stream = on_torch_cpu("synchronize"), on_torch_cpu("stream")
current_stream = on_torch_cpu("current_stream")


def manual_seed(seed: int) -> Any:
    """Seed torch's generator, the only one on a CPU."""
    return torch.manual_seed(seed)


def set_rng_state(new_state: Tensor, *_: Any, **__: Any) -> None:
    """Set the state of torch's generator, whichever device is asked for."""
    torch.set_rng_state(new_state)


def get_rng_state(*_: Any, **__: Any) -> Tensor:
    """The state of torch's generator."""
    return torch.get_rng_state()


_tensor_type = Tensor.type


def tensor_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The name of a tensor's type, as if the tensor were on a GPU."""
    result = _tensor_type(self, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


def cuda(self: Tensor, *_: Any, **__: Any) -> Tensor:
    """The tensor itself, which is where it is computed with."""
    return self


def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The tensor, as an array if asked: gloo wants the sizes of splits as lists."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def check_sequence_packing(**_: Any) -> tuple[bool, str | None]:
    """That `mamba2` takes packed sequences."""
    return True, None


def is_te_min_version(*_: Any) -> bool:
    """That Transformer Engine is as new as megatron-core asks: what stands in for it does all of that."""
    return True


_LINEAR = "megatron.core.tensor_parallel.layers:ColumnParallelLinear._forward_impl"
_REDUCE = "megatron.core.tensor_parallel.layers:reduce_from_tensor_model_parallel_region"
_GATHER = "megatron.core.distributed.param_and_grad_buffer:dist_all_gather_func"
_SCATTER = "megatron.core.distributed.param_and_grad_buffer:dist_reduce_scatter_func"


def linear(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """A linear layer as one product, where no other rank waits for a part of its gradients."""
    if options["allreduce_dgrad"] or options["sequence_parallel"]:
        return originals.original(_LINEAR)(self, input, weight, bias, **options)
    return F.linear(input, weight, bias)


def reduce_over_ranks(input_: Tensor, group: Any = None) -> Tensor:
    """The sum over the ranks of tensor parallelism; with a single rank what is given."""
    if group is not None and group.size() == 1:
        return input_
    return originals.original(_REDUCE)(input_, group)


def gather_weights(output: Tensor, part: Tensor, *, group: Any, **options: Any) -> Any:
    """Gather all ranks' weights in `output`; `part` is this rank's view of it. One rank has them all."""
    return None if group.size() == 1 else originals.original(_GATHER)(output, part, group=group, **options)


def scatter_gradients(part: Tensor, gradients: Tensor, *, group: Any, **options: Any) -> Any:
    """Add up all ranks' `gradients`, this rank's share in `part`, a view of them. One rank has it already."""
    return (
        None if group.size() == 1 else originals.original(_SCATTER)(part, gradients, group=group, **options)
    )


def l2_norm(
    chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """The norm of all numbers of the tensors (1,), added up in float64; called as APEX's kernel is."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors[0]]
    return torch.linalg.vector_norm(torch.stack(norms)).float().view(1), None


transformer_engine_torch = types.SimpleNamespace(thd_get_partitioned_indices=packed.partition)


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's FusedAdam: AdamW with one step counter for each parameter group.

    megatron-core's distributed optimizer cannot resume torch.optim.AdamW: that has no state before its
    first step, and after loading all parameters would share one `step` tensor.
    """

    # Without their decorator, which would import torch's compiler at the first call (0.6 s) to switch it off:
    # nothing is compiled here.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is supported on a CPU")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101), algorithm 2."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:  # a pipeline stage without routed experts, or a small group that others share
                continue
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    self.initialize_state(p)
            # The kernel of torch.optim.AdamW(fused=True), without its step counter for each parameter.
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(group["step"]))] * len(params),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        """Moments of no steps."""
        self.state[param].update(exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param))


# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have glibc reuse what a step frees: asking the kernel for it again, page by page, costs a step 5 %."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

"""What tests/benchmarks/scan.py measures: kernels with their tensors, and what they replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from snaketron.model.megatron import (
    experts8,
    scan_convolution,
    scan_groups,
    scan_kernels,
    scan_output,
    scan_states,
)

import torch
import torch.nn.functional as F
from tests.benchmarks import shapes
from torch import Tensor

MODELS = {"nano": shapes.NANO, "super": shapes.SUPER}
DEVICE, LENGTH, SHORT, CHUNK = "cuda", 8192, 512, 128  # both lengths need the same kernels
GROUPS = ("group_back of B", "group_back of C")
Function = Callable[[], Sequence[Tensor]]


class Kernel(NamedTuple):
    ours: Function  # all that it writes
    reads: Sequence[Tensor]
    compared: int | None = None  # of what it writes the first ones, which other sizes write in the same way
    prepare: Callable[[], object] = lambda: None  # what it overwrites

    def result(self) -> list[Tensor]:
        """What is compared, to be kept."""
        self.prepare()
        return [tensor.clone() for tensor in self.ours()[: self.compared]]


def kernels(length: int) -> dict[str, dict[str, Kernel]]:
    return {
        shape: Mamba(model, length).kernels() | Experts(model, length).kernels()
        for shape, model in MODELS.items()
    }


def _random(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=dtype)


class Mamba:
    """What the kernels of a Mamba layer read and write; in memory length is before batch, as in a model."""

    def __init__(self, model: dict[str, Any], length: int) -> None:
        h, p = model["mamba_num_heads"], model["mamba_head_dim"]
        g, n = model["mamba_num_groups"], model["mamba_state_dim"]
        parts, channels, chunks = [h * p, h * p + 2 * g * n, h], h * p + 2 * g * n, length // CHUNK

        def rows(width: int) -> Tensor:
            return _random(length, 1, width).transpose(0, 1)

        def of_convolution(xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, b, c = xbc.split([h * p, g * n, g * n], -1)
            return x.unflatten(-1, (h, p)), b.unflatten(-1, (g, n)), c.unflatten(-1, (g, n))

        gate, self.given, self.raw = rows(sum(parts)).split(parts, -1)
        self.gate = gate.unflatten(-1, (h, p))
        _, self.given_grad, self.raw_grad = rows(sum(parts)).split(parts, -1)
        self.weight, self.bias = _random(channels, 4) * 0.5, _random(channels)
        self.xbc_grad, self.grad = rows(channels), rows(h * p).unflatten(-1, (h, p))
        self.x, self.b, self.c = of_convolution(rows(channels))
        self.x_grad, self.b_grad, self.c_grad = of_convolution(rows(channels))
        fp32 = torch.float32
        self.rate, self.D = -torch.rand(h, device=DEVICE) - 0.5, _random(h, dtype=fp32)
        self.dt_bias = _random(h, dtype=fp32) - 4
        step = F.softplus(self.raw.float() + self.dt_bias)
        self.step = step.unflatten(1, (chunks, CHUNK)).permute(0, 3, 1, 2).contiguous()
        self.decay = (self.step * self.rate[:, None, None]).cumsum(-1)
        self.scores = _random(1, chunks, g, CHUNK, CHUNK, dtype=fp32)
        self.scores_grad = _random(1, chunks, g, CHUNK, CHUNK).tril()
        self.states, self.states_grad = (_random(1, chunks, h, p, n) for _ in range(2))
        self.states[:, 0] = 0

    @cached_property
    def of_step(self) -> Any:
        """The arguments of `step_back`."""
        given = (self.x, self.grad, self.scores, self.step, self.decay)
        sums = scan_kernels.scores_back(*given, None)[1]
        after, before = (self.group_back(after=after)[1] for after in (True, False))
        between = scan_states.states_back(self.grad, self.c, self.decay, self.states, None)[1]
        step_grad = scan_kernels.x_back(*given, self.states_grad, self.b, self.D, None, self.x_grad)
        given = (self.step, step_grad, self.raw, self.dt_bias, self.rate)
        return sums, before, after, between, *given, self.raw_grad

    def group_back(self, *, after: bool) -> tuple[Tensor, Tensor]:
        shared = (self.scores_grad, self.step, self.decay, None)
        if after:
            given, out = (self.x, self.states_grad, self.b, self.c), self.b_grad
        else:
            given, out = (self.grad, self.states, self.c, self.b), self.c_grad
        return out, scan_groups.group_back(*given, *shared, out, after=after)

    def kernels(self) -> dict[str, Kernel]:
        d = self
        position, half = (d.step, d.decay), d.scores[..., : CHUNK // 2, :]  # below the diagonal
        convolution, half_grad = (d.given, d.weight, d.bias), d.scores_grad[..., : CHUNK // 2, :]

        def convolve_back() -> tuple[Tensor, ...]:
            found = scan_convolution.convolve_back(*convolution, d.xbc_grad, None, d.given_grad)
            return *found, d.given_grad

        def x_back() -> tuple[Tensor, ...]:
            given = (d.x, d.grad, d.scores, *position, d.states_grad, d.b, d.D, None, d.x_grad)
            return scan_kernels.x_back(*given), d.x_grad

        def output() -> tuple[Tensor, Tensor]:
            return scan_output.output(d.x, d.gate, d.scores, *position, d.states, d.c, d.D, None)

        before = (d.grad, d.states, d.c, d.b, half_grad, d.decay)
        return {
            "convolve": Kernel(lambda: (scan_convolution.convolve(*convolution, None),), convolution),
            "convolve_back": Kernel(convolve_back, (*convolution, d.xbc_grad)),
            "states": Kernel(lambda: (scan_states.states(d.x, d.b, *position, None),), (d.x, d.b, *position)),
            "states_back": Kernel(
                lambda: scan_states.states_back(d.grad, d.c, d.decay, d.states, None),
                (d.grad, d.c, d.decay, d.states),
            ),
            "output": Kernel(output, (d.x, d.gate, half, *position, d.states, d.c, d.D)),
            "x_back": Kernel(x_back, (d.x, d.grad, half, *position, d.states_grad, d.b, d.D)),
            "scores_back": Kernel(
                lambda: scan_kernels.scores_back(d.x, d.grad, d.scores, *position, None),
                (d.x, d.grad, half, *position),
                1,  # its sums have a part for each side
            ),
            GROUPS[0]: Kernel(
                lambda: d.group_back(after=True), (d.x, d.states_grad, d.b, d.c, half_grad, *position)
            ),
            GROUPS[1]: Kernel(lambda: d.group_back(after=False), before),
            "step_back": Kernel(lambda: (*scan_kernels.step_back(*d.of_step), d.raw_grad), d.of_step[:-1]),
        }

    def replaced(self) -> dict[str, Function]:
        """What causal-conv1d and mamba-ssm do instead, as in their backward pass of the whole scan."""
        from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function
        from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined
        from mamba_ssm.ops.triton import ssd_state_passing as passing

        d, groups = self, self.b.shape[2]
        position, ends, scores_grad = (d.step, d.decay), d.decay[..., -1], self.scores_grad.float()

        def convolve() -> tuple[Tensor]:
            x = d.given.transpose(1, 2)
            out = causal_conv1d_fwd_function(x, d.weight, d.bias, None, None, None, True)
            return (out.transpose(1, 2),)

        def convolve_back() -> tuple[Tensor, ...]:
            x, grad = d.given.transpose(1, 2), d.xbc_grad.transpose(1, 2)
            given = (x, d.weight, d.bias, grad, None, None, None, None, False, True)
            x_grad, weight, bias, _ = causal_conv1d_bwd_function(*given)
            return weight, bias, x_grad.transpose(1, 2)

        def states() -> tuple[Tensor]:
            added = ssd_chunk_state._chunk_state_fwd(d.b, d.x, *position)
            found = passing._state_passing_fwd(added.flatten(-2), ends, out_dtype=d.x.dtype)[0]
            return (found.view_as(d.states),)

        def states_back() -> tuple[Tensor, Tensor]:
            grads = ssd_chunk_scan._chunk_scan_bwd_dstates(d.c, d.decay, d.grad, dtype=torch.float32)
            types = {"dstates_dtype": d.x.dtype, "states_dtype": d.x.dtype}
            given = (d.states.flatten(-2), ends, grads.flatten(-2))
            found, between, *_ = passing._state_passing_bwd(*given, has_initial_states=False, **types)
            return found.view_as(d.states), between

        def output() -> tuple[Tensor, Tensor]:
            return ssd_chunk_scan._chunk_scan_fwd(d.scores, d.x, *position, d.c, d.states, D=d.D, z=d.gate)

        def x_back() -> tuple[Tensor, Tensor]:
            given = (d.x, *position, d.b, d.scores, d.grad, d.states_grad)
            x_grad, step_grad, _ = ssd_combined._chunk_scan_chunk_state_bwd_dx(*given, D=d.D)
            return step_grad, x_grad

        def decay_back() -> Tensor:
            return ssd_chunk_scan._chunk_scan_bwd_ddAcs_stable(d.x, *position, d.grad, d.scores)

        def scores_back() -> tuple[Tensor]:
            decay_back()
            return (ssd_chunk_scan._chunk_scan_bwd_dcb(d.x, *position, d.grad, ngroups=groups),)

        def b_back() -> tuple[Tensor, Tensor]:
            given = (d.x, *position, d.states_grad)
            found, after = ssd_chunk_state._chunk_state_bwd_db(*given, B=d.b, ngroups=groups)
            return ssd_bmm._bmm_chunk_bwd(d.c, scores_grad, residual=found), after

        def c_back() -> tuple[Tensor, Tensor]:
            given = (d.states, d.decay, d.grad)
            found, before = ssd_chunk_scan._chunk_scan_bwd_dC(*given, C=d.c, ngroups=groups)
            return ssd_bmm._bmm_chunk_bwd(d.b, scores_grad.mT, residual=found), before

        between, (step_grad, _) = d.of_step[3], x_back()
        within, (_, before), (_, after) = decay_back(), c_back(), b_back()

        def step_back() -> tuple[Tensor, ...]:
            before[..., -1] += between  # again in each call; the first is compared
            total = within + after + before.flip([-1]).cumsum(-1).flip([-1])
            given, options = (total, step_grad, d.raw, d.rate), {"dt_bias": d.dt_bias, "dt_softplus": True}
            raw, rate, bias = ssd_chunk_state._chunk_cumsum_bwd(*given, **options)
            return rate, bias, raw

        return {
            "convolve": convolve,
            "convolve_back": convolve_back,
            "states": states,
            "states_back": states_back,
            "output": output,
            "x_back": x_back,
            "scores_back": scores_back,
            GROUPS[0]: lambda: b_back()[:1],
            GROUPS[1]: lambda: c_back()[:1],
            "step_back": step_back,
        }


class Experts:
    """What the kernels of fp8 read and write; a token has as many rows as experts."""

    def __init__(self, model: dict[str, Any], length: int) -> None:
        rows, hidden = length * model["moe_router_topk"], model["moe_ffn_hidden_size"]
        inner = model["moe_latent_size"] or model["hidden_size"]
        experts = model["num_moe_experts"] if length > SHORT else 1
        self.x, self.hidden, self.grad = _random(rows, inner), _random(rows, hidden), _random(rows, hidden)
        self.probs = torch.rand(rows, device=DEVICE)
        self.weights = [_random(experts, hidden, inner), _random(experts, inner, hidden)]
        self.rounded = [experts8.empty(weights) for weights in self.weights]
        self.first_grad = self.grad.clone()

    def kernels(self) -> dict[str, Kernel]:
        def activate_back() -> tuple[Tensor, ...]:
            # The gradient is overwritten, and the time does not depend on it.
            plain, rounded = experts8.activate_back(self.hidden, self.probs, self.grad)
            return *plain, *rounded

        def round_weights() -> tuple[Tensor, ...]:
            for weights, rounded in zip(self.weights, self.rounded, strict=True):
                experts8.round_weights(weights, rounded)
            return *self.rounded[0], *self.rounded[1]

        return {
            "round_rows": Kernel(lambda: experts8.round_rows(self.x), (self.x,)),
            "activate": Kernel(lambda: experts8.activate(self.hidden, self.probs), (self.hidden, self.probs)),
            "activate_back": Kernel(
                activate_back,
                (self.hidden, self.probs, self.grad),
                prepare=lambda: self.grad.copy_(self.first_grad),
            ),
            "round_weights": Kernel(round_weights, self.weights),
        }

    def plain(self) -> dict[str, Function]:
        """What the kernels compute, in plain PyTorch."""

        def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
            scales = x.abs().amax(-1) / experts8.LARGEST.value
            return (x / scales[..., None]).to(experts8.FP8), scales

        def activate() -> Tensor:
            return self.hidden.float().relu().square() * self.probs[:, None]

        def activate_back() -> tuple[Tensor, ...]:
            relu, grad = self.hidden.float().relu(), self.first_grad.float()
            hidden_grad = 2 * relu * grad * self.probs[:, None]
            return activate(), hidden_grad, (relu.square() * grad).sum(1), *rounded(hidden_grad)

        def weights() -> tuple[Tensor, ...]:
            found = ((*rounded(w.float()), *rounded(w.float().mT)) for w in self.weights)
            return sum(found, ())

        return {
            "round_rows": lambda: rounded(self.x.float()),
            "activate": lambda: rounded(activate()),
            "activate_back": activate_back,
            "round_weights": weights,
        }

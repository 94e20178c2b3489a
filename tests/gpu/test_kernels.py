"""The GPU's kernels against plain PyTorch in double precision."""

from __future__ import annotations

from collections.abc import Callable

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import mamba2
from tests.unit.model.megatron.test_experts import errors

import pytest
import torch
from torch import Tensor

# Triton's products of fp32 numbers are TF32 (10 bits): about 3e-4; bf16 has 8 bits.
TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 2e-2}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor], weight: Tensor) -> list[Tensor]:
    """The output and the gradient of each input."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    out = function(**leaves)
    (out * weight.to(out.dtype)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves.values())]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_scan_that_stands_in_on_a_cpu_has_the_gradients_of_the_kernel(dtype, packed):
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    torch.manual_seed(0)
    batch, length, heads, width, groups, state = 2, 512, 8, 64, 2, 64
    inner, conv = heads * width, heads * width + 2 * groups * state

    def by_length(tensor: Tensor) -> Tensor:
        """(batch, length, ...) as it lies in memory in a model: the length first."""
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    def random(*shape: int, like: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device="cuda")).to(like)

    inputs = {
        "zxbcdt": random(batch, length, inner + conv + heads),
        "conv1d_weight": random(conv, 4, scale=0.5),
        "conv1d_bias": random(conv, scale=0.1),
        "dt_bias": random(heads, like=torch.float32),
        "A": -torch.rand(heads, device="cuda") * 4 - 1,
        "D": random(heads, like=torch.float32),
    }
    sequence = torch.zeros(batch, length, dtype=torch.int32, device="cuda")
    sequence[:, 100:], sequence[:, 333:] = 1, 2
    options = {"chunk_size": 128, "headdim": width, "ngroups": groups}
    options |= {"seq_idx": sequence if packed else None, "activation": "silu"}
    weight = torch.randn(batch, length, inner, device="cuda")
    kernel = gradients(
        lambda zxbcdt, **x: mamba_split_conv1d_scan_combined(
            by_length(zxbcdt), **x, **options, norm_before_gate=False
        ),
        inputs,
        weight,
    )
    exact = gradients(
        lambda **x: mamba2.mamba_split_conv1d_scan_combined(**x, **options),
        {name: value.double() for name, value in inputs.items()},
        weight,
    )
    errors = [relative(a, b) for a, b in zip(kernel, exact, strict=True)]
    print(dtype, [f"{e:.1e}" for e in errors])
    assert max(errors) < TOLERANCE[dtype]


def test_experts_are_those_of_a_loop_over_them():
    found = errors(torch.bfloat16)
    print([f"{e:.1e}" for e in found])
    assert max(found) < TOLERANCE[torch.bfloat16]


def test_gradient_accumulation_is_a_product_added_to_fp32():
    import fused_weight_gradient_mlp_cuda

    torch.manual_seed(0)
    x, grad = (torch.randn(300, n, device="cuda").bfloat16() for n in (64, 32))
    total = torch.randn(32, 64, device="cuda")
    expected = total.double() + grad.double().T @ x.double()
    fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, grad, total)
    assert relative(total, expected) < 1e-6

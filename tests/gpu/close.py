"""How close kernels come to plain PyTorch in double precision."""

from __future__ import annotations

from collections.abc import Callable

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

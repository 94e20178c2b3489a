"""Norms on a GPU against plain PyTorch in double precision."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import originals, replacements
from tests.gpu.close import TOLERANCE, gradients, relative

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    from snaketron.model.megatron import norms


# Largest relative errors of a norm: fp32 has 24 bits, and bf16 has 8, which rounds to 1.7e-3.
NORM = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}


@pytest.mark.parametrize(
    ("count", "groups", "width"), [(70, 3, 96), (4200, 8, 512), (2, 1, 17), (6000, 1, 2688)]
)
@pytest.mark.parametrize("dtype", NORM)
def test_the_norm_of_groups_is_that_of_its_formula(dtype, count, groups, width):
    torch.manual_seed(0)
    columns = groups * width
    inputs = {
        "x": torch.randn(count // 2, 2, columns, device="cuda").to(dtype),
        "weight": torch.rand(columns, device="cuda").to(dtype) + 0.5,
    }
    weight = torch.randn(count // 2, 2, columns, device="cuda").to(dtype)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        parts = x.unflatten(-1, (groups, width))
        return (parts * (parts.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * weight

    found = gradients(lambda x, weight: norms.GroupedNorm.apply(x, weight, 1e-5, width), inputs, weight)
    exact = gradients(formula, {name: value.double() for name, value in inputs.items()}, weight)
    errors = [relative(a, b) for a, b in zip(found, exact, strict=True)]
    print(dtype, [f"{e:.1e}" for e in errors])
    assert max(errors) < NORM[dtype]
    again = gradients(lambda x, weight: norms.GroupedNorm.apply(x, weight, 1e-5, width), inputs, weight)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize(("count", "width"), [(70, 96), (6000, 2688), (3000, 4096)])
@pytest.mark.parametrize("dtype", NORM)
@pytest.mark.parametrize("trained", [True, False])
def test_a_norm_adds_another_gradient_to_that_of_its_input(trained, dtype, count, width):
    torch.manual_seed(0)
    x, grad, other = (torch.randn(count, width, device="cuda").to(dtype) for _ in range(3))
    weight = torch.rand(width, device="cuda").to(dtype) + 0.5
    rstd = norms.norm(x, weight, 1e-5, width)[1]
    found = norms.norm_back(x, weight, rstd, grad, width, trained=trained, added=other)
    plain = norms.norm_back(x, weight, rstd, grad, width)
    exact = x.double().requires_grad_()
    (exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight).backward(grad.double())
    assert relative(found[0], exact.grad + other.double()) < NORM[dtype]
    assert torch.equal(found[1], plain[1]) if trained else found[1] is None  # that of the weight


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", NORM)
@pytest.mark.parametrize("module", ["RMSNorm", "LayerNormLinear"])
def test_a_norm_of_transformer_engine_is_that_of_its_formula(module, dtype, frozen):
    """Of Nano's width; a frozen norm, as under LoRA, gets no gradient.

    The product after the norm is with a unit matrix. In fp32 it is TF32, which rounds the output, and leaves
    gradients as they are that are numbers of bf16.
    """
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    rows, width = 1023, 2688
    x = torch.randn(rows, 1, width, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(rows, 1, width, device="cuda").bfloat16().to(dtype)
    if module == "RMSNorm":
        layer = te.RMSNorm(width, eps=1e-5, params_dtype=dtype)
        weight = layer.weight
    else:
        layer = te.LayerNormLinear(
            width, width, eps=1e-5, normalization="RMSNorm", bias=False, params_dtype=dtype
        )
        weight = layer.layer_norm_weight
        layer.weight.data.copy_(torch.eye(width))
    weight.data.uniform_(0.5, 1.5)
    layer.requires_grad_(not frozen)
    out = layer(x)
    out.backward(grad)
    exact, factors = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * factors
    expected.backward(grad.double())
    errors = [relative(x.grad, exact.grad)]
    if frozen:
        assert weight.grad is None
    else:
        errors.append(relative(weight.grad, factors.grad))
    print(module, dtype, frozen, f"{relative(out, expected):.1e}", [f"{e:.1e}" for e in errors])
    assert max(errors) < NORM[dtype]
    assert relative(out, expected) < (TOLERANCE if module == "LayerNormLinear" else NORM)[dtype]


@pytest.mark.parametrize("recipe", ["Float8CurrentScaling", "Float8BlockScaling", "DelayedScaling"])
def test_a_norm_before_a_product_in_fp8_is_transformer_engine_s(recipe, monkeypatch):
    """The output and all gradients differ by less than rounding to fp8 changes them (2.6e-2)."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    torch.manual_seed(0)
    rows, width = 512, 1152  # of which Transformer Engine has no kernel
    layer = te.LayerNormLinear(
        width, 256, eps=1e-5, normalization="RMSNorm", bias=False, params_dtype=torch.bfloat16
    )
    layer.layer_norm_weight.data.uniform_(0.5, 1.5)
    x, grad = (torch.randn(rows, n, device="cuda").bfloat16() for n in (width, 256))
    chosen = getattr(recipes, recipe)()

    def results() -> list[Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with te.autocast(enabled=True, recipe=chosen):
            out = layer(leaf)
        out.backward(grad)
        return [out.detach(), leaf.grad, layer.weight.grad, layer.layer_norm_weight.grad]

    results()  # with delayed scaling it measures the largest values
    own = results()
    row = next(row for row in replacements.TABLE if row.what == "RMSNorm of widths without a kernel")
    for name in row.pieces:
        monkeypatch.setattr(*originals.owner_of(name), originals.original(name))
    errors = [relative(a, b.double()) for a, b in zip(own, results(), strict=True)]
    print(recipe, [f"{e:.1e}" for e in errors])
    assert max(errors) < 2e-2

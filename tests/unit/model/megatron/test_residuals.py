"""The sum of a layer and its input, whose gradient the layer's norm adds; by plain autograd, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Model, Parallel
from snaketron.model import backend, spec
from snaketron.model.megatron import originals, replacements, residuals
from snaketron.model.megatron.row import stand_in
from tests.unit.sizes.models import SMALL

import pytest
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from torch import Tensor, nn

WIDTH = 8
Layer = Callable[[Tensor], Tensor]


class Norm(torch.autograd.Function):
    """RMSNorm that takes the gradient that waits for it, as `gpu.rmsnorm_bwd` does."""

    taken = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return torch.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            normal = torch.rms_norm(x, x.shape[-1:], weight, ctx.eps)
        found, of_weight = torch.autograd.grad(normal, (x, weight), grad)
        added = residuals.take(ctx.saved_tensors[1], ctx.saved_tensors[0], found)
        Norm.taken += added is not None
        return found if added is None else found + added, of_weight, None


class Parts(nn.Module):
    """A norm and a product, in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, dtype=torch.float64)
        self.product = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)

    def plain(self, x: Tensor) -> Tensor:
        return x + self.product(torch.rms_norm(x, [WIDTH], self.norm.weight))

    def ours(self, x: Tensor, norm: Callable[..., Tensor] = Norm.apply, dropout: float = 0.0) -> Tensor:
        x = residuals.enter(x, self.norm, self.product)
        y = self.product(norm(x, self.norm.weight))
        return residuals.bias_dropout_add_unfused(True)((y, None), x, dropout)

    def left_to_autograd(self, x: Tensor) -> Tensor:
        return self.ours(x, lambda x, weight: torch.rms_norm(x, [WIDTH], weight))


def gradients(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    model.zero_grad()
    Norm.taken = 0
    run()
    assert not residuals._waiting
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("kind", "taken"), [("ours", 3), ("left_to_autograd", 0)])
def test_gradients_are_those_of_autograd_whoever_adds_them(kind, taken):
    """Two layers, the second of which is used twice, as one of multi-token prediction is."""
    torch.manual_seed(0)
    model = nn.ModuleList([Parts(), Parts()])
    x = torch.randn(5, WIDTH, dtype=torch.float64)

    def of(kind: str) -> list[Tensor]:
        given = x.clone().requires_grad_()
        layers = [getattr(layer, kind) for layer in (model[0], model[1])]
        first = layers[0](given)
        found = gradients(model, lambda: layers[1](layers[1](first)).square().sum().backward())
        return [*found, given.grad]

    expected, found = of("plain"), of(kind)
    assert Norm.taken == taken
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_micro_batches_that_are_under_way_together_have_their_own_gradients(order):
    """As in a pipeline: two forward passes, then two backward passes."""
    torch.manual_seed(0)
    model = Parts()
    x = [torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def of(layer: Layer) -> list[Tensor]:
        outs = [layer(given) for given in x]
        for given in x:
            given.grad = None
        found = gradients(model, lambda: [outs[i].square().sum().backward() for i in order])
        return [*found, *(given.grad.clone() for given in x)]

    expected, found = of(model.plain), of(model.ours)
    assert Norm.taken == 2
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_what_a_broken_backward_pass_left_is_added_to_no_other():
    """The next one has a norm without a layer where the broken one's was, as a new model may."""
    torch.manual_seed(0)
    model, other = Parts(), Parts()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def fail(*_: Any) -> None:
        raise MemoryError

    with model.product.register_full_backward_pre_hook(fail), pytest.raises(MemoryError):
        model.ours(x).sum().backward()
    assert residuals._waiting
    given = x.detach().requires_grad_()
    grad = torch.randn_like(x)
    gradients(other, lambda: Norm.apply(other.ours(given), model.norm.weight).backward(grad))
    found = given.grad
    given.grad = None
    torch.rms_norm(other.plain(given), [WIDTH], model.norm.weight).backward(grad)
    assert Norm.taken == 1  # the other layer's
    assert torch.allclose(found, given.grad, rtol=1e-12, atol=1e-12)


def test_nothing_waits_where_nothing_is_trained_and_with_dropout():
    """An input without a gradient, no gradients at all, and a sum that megatron-core makes."""
    model = Parts()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    assert residuals.enter(x, model.norm, model.product) is x
    with torch.no_grad():
        leaf = x.clone().requires_grad_()
        assert residuals.enter(leaf, model.norm, model.product) is leaf
        assert torch.equal(model.ours(leaf), model.plain(leaf))
    gradients(model, lambda: model.ours(leaf, dropout=0.5).sum().backward())
    assert Norm.taken == 0


def test_two_calls_of_a_layer_within_each_other_have_their_own_gradients():
    """Both norms, then both sums: backwards, both gradients wait before the first norm comes."""
    torch.manual_seed(0)
    model = Parts()
    x = [torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def within() -> list[Tensor]:
        entered = [residuals.enter(one, model.norm, model.product) for one in x]
        y = [model.product(normal) for normal in [Norm.apply(one, model.norm.weight) for one in entered]]
        add = residuals.bias_dropout_add_unfused(True)
        return [add((one, None), to, 0.0) for one, to in zip(y, entered, strict=True)]

    def of(run: Callable[[], list[Tensor]]) -> list[Tensor]:
        for one in x:
            one.grad = None
        first, second = run()
        found = gradients(model, lambda: (first.square().sum() + second.sin().sum()).backward())
        return [*found, *(one.grad.clone() for one in x)]

    for a, b in zip(of(lambda: [model.plain(one) for one in x]), of(within), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert Norm.taken == 2


def test_a_bias_and_a_sum_of_two_types_are_megatron_cores():
    x = residuals.enter(torch.ones(2, requires_grad=True), torch.nn.RMSNorm(2), None)
    add = residuals.bias_dropout_add_unfused(True)
    assert add((torch.ones(2), torch.full((2,), 3.0)), x, 0.0).tolist() == [5.0, 5.0]
    x = residuals.enter(torch.ones(2, requires_grad=True), torch.nn.RMSNorm(2), None)
    total = add((torch.ones(2).bfloat16(), None), x, 0.0)
    assert total.dtype == torch.float32 and total.tolist() == [2.0, 2.0]
    total.sum().backward()
    assert not residuals._waiting


def test_a_gradient_of_another_shape_or_type_is_left_to_autograd():
    """The norm of a rank that has the rows of all ranks, and one in fp32 in a model in bf16."""
    weight, x = torch.ones(4), torch.zeros(2, 4)
    residual = residuals.Residual(weight, x)
    residual.grad = torch.ones(2, 4)
    residuals._waiting[residual.key] = residual
    assert residuals.take(weight, x, torch.zeros(4, 4)) is None
    assert residuals.take(weight, x, torch.zeros(2, 4).bfloat16()) is None
    assert residuals.take(weight, torch.zeros(2, 4), torch.zeros(8)) is None  # of another call
    taken = residuals.take(weight, x, torch.zeros(8))
    assert taken is not None and taken.tolist() == [1.0] * 8
    assert residuals.take(weight, x, torch.zeros(8)) is None


@pytest.mark.skipif(backend.HAS_GPU, reason="its norms are others: tests/gpu/test_replacements.py")
@pytest.mark.parametrize("recompute", [[], ["layer"], ["moe"]])
def test_the_norm_of_each_layer_of_a_model_adds_the_gradient_of_its_input(recompute, monkeypatch):
    """Of Mamba, attention and routed layers, in multi-token prediction too, as megatron-core calls them."""
    model = Model(**SMALL)
    layers = len(model.hybrid_layer_pattern) + model.mtp_num_layers * len(model.mtp_hybrid_layer_pattern)

    def of_model() -> list[Tensor]:
        torch.manual_seed(0)
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = spec.transformer_config(model, Parallel(), **spec.recomputation(recompute))
        built = spec.build_model(config, model, Parallel(), 256, 512)
        ids = torch.arange(100)[None]
        mask = torch.ones_like(ids).float()
        return gradients(built, lambda: built(ids, None, None, labels=ids, loss_mask=mask).sum().backward())

    expected = of_model()
    (row,) = (row for row in replacements.TABLE if row.what == "the gradient of residual connections")
    for name, by in row.pieces.items():
        monkeypatch.setitem(originals._originals, name, originals.original(name))
        monkeypatch.setattr(*originals.owner_of(name), stand_in(by))

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if weight is None:  # Mamba's, which is within the layer
            return torch.rms_norm(x, shape, None, eps)
        return cast(Tensor, Norm.apply(x, weight, eps))

    monkeypatch.setattr(F, "rms_norm", rms_norm)
    found = of_model()
    assert Norm.taken == layers
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)
